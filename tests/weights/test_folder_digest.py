"""The digest that results are filed under: equal for a copy, another for other weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_t1.weights.folder_digest import weights_digest


def test_a_copy_has_the_same_digest_and_other_weights_another(tiny_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dir, tmp_path / "copy")
    assert weights_digest(tmp_path / "copy") == weights_digest(tiny_dir)
    path = tmp_path / "copy/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # the last number of the last tensor
    path.write_bytes(data)
    assert weights_digest(tmp_path / "copy") != weights_digest(tiny_dir)
    path.unlink()
    with pytest.raises(ValueError, match="has no config"):
        weights_digest(tmp_path / "copy")
