"""Digests, the shared file and its leftovers: what can be held without a server."""

from __future__ import annotations

import secrets
import stat
from pathlib import Path

import pytest
import torch

from megatron_t1.push.digests import agrees, summarize
from megatron_t1.push.layout import PieceSpec, TensorSpec
from megatron_t1.push.shm import SHM_DIR, SharedFile, map_shared


def digest(view: torch.Tensor, shape: tuple[int, ...]) -> str:
    """As the trainer makes it of its numbers of a piece of this shape."""
    tensor = TensorSpec("a", str(view.dtype).removeprefix("torch."), shape, 0)
    return summarize(view, PieceSpec(tensor, (0,) * len(shape), shape, 0)).digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 8), (6, 7), (12,), (), (3, 4, 8)])
def test_a_digest_sees_every_changed_byte(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    expected = digest(tensor, shape)
    data = tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
    for i in range(len(data)):
        for bit in (1, 128):
            data[i] ^= bit
            assert not agrees(tensor, expected)
            data[i] ^= bit
    assert agrees(tensor, expected)


@pytest.mark.parametrize(("columns", "kind"), [(8, "rows"), (6, "crc32")])
def test_a_digest_does_not_depend_on_strides_or_split_dimensions(columns: int, kind: str) -> None:
    whole = torch.randn(12, 2 * columns).bfloat16()
    cut = whole[2:10, columns:]  # as the server sees a piece in the file
    split = cut.clone().view(2, 4, columns)  # as Megatron holds it
    expected = digest(split, cut.shape)
    assert expected.startswith(f"{kind}:")
    assert agrees(cut, expected)
    assert digest(split.transpose(0, 1).contiguous().transpose(0, 1), cut.shape) == expected
    assert not agrees(whole[3:11, columns:], expected)


def test_swapped_rows_are_seen() -> None:
    tensor = torch.randn(4, 8)
    assert digest(tensor, (4, 8)).startswith("rows:")
    assert not agrees(tensor[[1, 0, 2, 3]], digest(tensor, (4, 8)))


def test_the_shared_file_is_private_and_goes_with_its_owner() -> None:
    file = SharedFile(4096)
    mode = Path(file.path).stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    other = SharedFile(4096, file.path)
    other.buffer.fill_(7)
    assert file.buffer.eq(7).all()
    other.close()
    assert Path(file.path).exists()
    file.close()
    assert not Path(file.path).exists()


def test_the_file_of_a_killed_trainer_is_removed_by_the_next_one() -> None:
    left = SHM_DIR / f"t1-weights-{secrets.token_hex(8)}"
    left.touch(mode=0o600)
    mine = SharedFile(4096)
    assert not left.exists()
    left.touch(mode=0o600)
    left.write_bytes(bytes(4096))
    kept = map_shared(str(left), 4096)
    SharedFile(4096).close()
    assert left.exists(), "somebody has it"
    assert Path(mine.path).exists()
    del kept
    SharedFile(4096).close()
    assert not left.exists()
    mine.close()


def test_a_model_larger_than_the_memory_is_an_error_not_a_crash() -> None:
    with pytest.raises(RuntimeError, match=r"the weights need \d+ bytes in /dev/shm, \d+ are free"):
        SharedFile(2**50)
