"""Broadcasts between members in one process: bytes, bounds, order, digests, tokens, and members that do not come."""

from __future__ import annotations

import dataclasses
import secrets
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import pytest
import torch

from megatron_t1.push import collective
from megatron_t1.push.digests import summarize
from megatron_t1.push.group import Group, GroupError, Invitation, Meeting
from megatron_t1.push.layout import ALIGNMENT, Layout, PieceSpec, TensorSpec

TENSORS = {
    "model.norm.weight": torch.randn(32),
    "model.layers.1.mlp.down_proj.weight": torch.randn(40, 24).bfloat16(),
    "model.layers.0.self_attn.q_proj.weight": torch.randn(48, 16),
    "model.embed_tokens.weight": torch.randn(301, 32),
    "model.layers.0.scale": torch.tensor(2.5),
}
CUTS = {
    "model.layers.1.mlp.down_proj.weight": (((0, 0), (40, 12)), ((0, 12), (40, 24))),
    "model.embed_tokens.weight": (((0, 0), (150, 32)), ((150, 0), (301, 32))),
}
"""Of two owners; what is not here belongs to the second one."""


def layout() -> Layout:
    tensors, pieces = [], []
    for name, tensor in TENSORS.items():
        spec = TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 0)
        tensors.append(spec)
        cuts = CUTS.get(name)
        if cuts:
            pieces += [PieceSpec(spec, start, stop, (0, 3)[owner]) for owner, (start, stop) in enumerate(cuts)]
        else:
            pieces.append(PieceSpec(spec, (0,) * tensor.dim(), tuple(tensor.shape), 3))
    return Layout(tensors, pieces, 0)


def numbers(piece: PieceSpec) -> torch.Tensor:
    """As Megatron holds them: strewn, and split further, where the tensor allows it."""
    part = piece.of(TENSORS[piece.tensor.name])
    if part.dim() == 2 and part.shape[0] % 2 == 0:
        return torch.stack([part, part], dim=1)[:, 0].view(2, -1, part.shape[1])
    return part


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    with Meeting("127.0.0.1", secrets.token_urlsafe(32), 20) as meeting:
        yield meeting


def invitation(meeting: Meeting, size: int = 4, timeout_s: float = 20) -> Invitation:
    return Invitation(*meeting.address, meeting._token.decode(), size, size // 2, "cpu", timeout_s)


def members(*parts: Callable[[], object]) -> list[Future[object]]:
    """All at once, each on a thread."""
    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(part) for part in parts]
        wait(futures)
    return futures


def exchanged(
    meeting: Meeting, digests: list[str], bucket_bytes: int = 4096
) -> list[tuple[dict[str, torch.Tensor], list[PieceSpec]]]:
    """What two workers got of two owners."""
    plan, invited = layout(), dataclasses.replace(invitation(meeting), bucket_bytes=bucket_bytes)

    def own(member: int, owner: int) -> None:
        group = Group(invited, member)
        collective.send(group, plan, [(numbers(piece), piece) for piece in plan.of_rank(owner)])
        group.close()

    def work(member: int) -> tuple[dict[str, torch.Tensor], list[PieceSpec]]:
        group, bad = Group(invited, member), []
        got = dict(collective.receive(group, plan, torch.device("cpu"), digests, bad))
        group.close()
        return got, bad

    done = members(lambda: own(0, 0), lambda: own(1, 3), lambda: work(2), lambda: work(3))
    return [future.result() for future in done][2:]


def right_digests() -> list[str]:
    return [summarize(numbers(piece), piece).digest for piece in layout().pieces]


@pytest.mark.parametrize(
    ("bucket_bytes", "small"), [(128, 64), (4096, 600), (4096, 1 << 20), (1 << 20, 600), (1 << 20, 0)]
)
def test_every_byte_arrives(bucket_bytes: int, small: int, meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "_SMALL_BYTES", small)
    for got, bad in exchanged(meeting, right_digests(), bucket_bytes):
        assert bad == []
        assert got.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(got[name], tensor), name
    for window in collective.windows(layout(), bucket_bytes):
        spans = [span for spans in window.values() for span in spans]
        num_bytes = sum(-(-span.num_bytes // ALIGNMENT) * ALIGNMENT for span in spans)
        assert num_bytes <= bucket_bytes or len(spans) == 1 == spans[0].stop - spans[0].start


def test_the_layers_come_in_order_and_the_embedding_among_them() -> None:
    names = [
        span.piece.tensor.name.removeprefix("model.")
        for window in collective.windows(layout(), 2048)
        for spans in window.values()
        for span in spans
    ]
    layers = [name for name in names if name.startswith("layers.")]
    assert layers == sorted(layers, key=lambda name: name.split(".")[1])
    embedding = [i for i, name in enumerate(names) if name == "embed_tokens.weight"]
    assert names.index("norm.weight") > embedding[-1]
    first, last = names.index(layers[0]), len(names) - 1 - names[::-1].index(layers[-1])
    assert sum(first < i < last for i in embedding) > len(embedding) // 2


def test_other_bytes_than_the_owners_are_named_and_break_nothing(meeting: Meeting) -> None:
    digests = right_digests()
    digests[2] = digests[1]
    for got, bad in exchanged(meeting, digests):
        assert [(piece.tensor.name, piece.rank) for piece in bad] == [("model.layers.1.mlp.down_proj.weight", 3)]
        assert got.keys() == TENSORS.keys()


def test_a_worker_on_another_device_than_the_group_copies_out_of_the_bucket(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo would write to a GPU's address as to the host's; torch's `meta` stands for the GPU."""
    monkeypatch.setattr(collective, "_SMALL_BYTES", 0)
    monkeypatch.setattr(collective, "agrees", lambda view, expected: True)
    plan, invited = layout(), invitation(meeting, size=3)
    invited = dataclasses.replace(invited, num_owners=2, bucket_bytes=4096)

    def own(member: int, owner: int) -> None:
        group = Group(invited, member)
        collective.send(group, plan, [(numbers(piece), piece) for piece in plan.of_rank(owner)])
        group.close()

    def work() -> list[str]:
        group = Group(invited, 2)
        came = collective.receive(group, plan, torch.device("meta"), ["crc32:"] * len(plan.pieces), [])
        names = [name for name, tensor in came if tensor.is_meta]
        group.close()
        return names

    done = members(lambda: own(0, 0), lambda: own(1, 3), work)
    assert set(done[2].result()) == TENSORS.keys()


def test_an_error_of_one_member_breaks_the_group_for_all_at_once(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(spec: TensorSpec, device: torch.device) -> torch.Tensor:
        if device.type == "meta":
            raise RuntimeError("out of memory")
        return torch.empty(spec.shape, dtype=spec.torch_dtype)

    monkeypatch.setattr(collective, "_empty", empty)
    plan, invited = layout(), dataclasses.replace(invitation(meeting), bucket_bytes=128)

    def own(member: int, owner: int) -> None:
        collective.send(Group(invited, member), plan, [(numbers(piece), piece) for piece in plan.of_rank(owner)])

    def work(member: int, device: str) -> None:
        list(collective.receive(Group(invited, member), plan, torch.device(device), right_digests(), []))

    done = members(lambda: own(0, 0), lambda: own(1, 3), lambda: work(2, "cpu"), lambda: work(3, "meta"))
    errors = [future.exception() for future in done]
    assert str(errors[3]) == "out of memory"
    assert all(isinstance(error, GroupError) and "imed out" not in str(error) for error in errors[:3]), errors


def test_without_the_token_nobody_joins(meeting: Meeting) -> None:
    alone = invitation(meeting, size=1)
    with pytest.raises(GroupError):  # closed or reset, as the kernel has it
        Group(dataclasses.replace(alone, token="x" * len(alone.token)), 0)
    Group(alone, 0).close()


def test_a_member_that_does_not_come_is_not_waited_for_longer_than_the_deadline(meeting: Meeting) -> None:
    with pytest.raises(GroupError):
        Group(invitation(meeting, size=2, timeout_s=0.3), 0)


def test_who_waits_hears_that_the_meeting_is_over(meeting: Meeting) -> None:
    (alone, _) = members(lambda: Group(invitation(meeting, size=2), 0), meeting.close)
    assert isinstance(alone.exception(), GroupError)


@pytest.mark.parametrize("missing", [0, 3])
def test_an_owner_or_worker_that_is_gone_breaks_the_broadcasts_of_all_others(missing: int, meeting: Meeting) -> None:
    invited = invitation(meeting)

    def take_part(member: int) -> None:
        group, data = Group(invited, member), torch.zeros(1 << 22, dtype=torch.uint8)
        try:
            for _ in range(0 if member == missing else 20):
                for wait_for in [group.broadcast(data, owner) for owner in (0, 1)]:
                    wait_for()
        finally:
            group.close()

    done = members(*(partial(take_part, member) for member in range(4)))
    failed = [isinstance(future.exception(), GroupError) for future in done]
    assert failed == [member != missing for member in range(4)]


def test_a_silent_member_breaks_the_group_at_the_deadline(meeting: Meeting) -> None:
    invited = invitation(meeting, size=2, timeout_s=1)

    def waits() -> None:
        group = Group(invited, 1)
        try:
            group.broadcast(torch.zeros(8, dtype=torch.uint8), 0)()
        finally:
            group.close()

    groups: list[Group] = []
    done = members(lambda: groups.append(Group(invited, 0)), waits)
    assert isinstance(done[1].exception(), GroupError)


def test_the_meeting_listens_on_its_own_address_alone(meeting: Meeting) -> None:
    host, port = meeting.address
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
