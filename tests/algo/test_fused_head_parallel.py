"""The head over 1, 2 and 4 gloo processes: equal to the plain float64 reference, and to 1e-6 to one another."""

from pathlib import Path as FilePath

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_t1.algo.config import CHUNK_LOGITS
from megatron_t1.algo.head.layout import Head
from tests.algo.reference import PATHS, case, max_relative_error

S, VOCAB, PADDED, TEMPERATURE = 64, 601, 1024, 0.8
SIZES = (1, 2, 4)


def _case():
    return case(s=S, hidden_size=32, vocab_size=VOCAB, padded_size=PADDED, num_targets=37)


def _run(rank: int, tp: int, folder: FilePath) -> None:
    """Every path, with and without sequence parallelism; saves what this rank got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init{tp}", rank=rank, world_size=tp)
    # Small tiles and chunks; the last rank of four holds nothing but padding rows.
    CHUNK_LOGITS["cpu"] = 2000
    rows = slice(rank * PADDED // tp, (rank + 1) * PADDED // tp)
    results = {}
    for sequence_parallel in (False, True):
        part = slice(rank * S // tp, (rank + 1) * S // tp) if sequence_parallel else slice(0, S)
        for path in PATHS:
            c = _case()
            hidden, weight = (t.clone().requires_grad_() for t in (c.hidden[part], c.weight[rows]))
            c.anchor_hidden, c.anchor_weight = c.anchor_hidden[part], c.anchor_weight[rows]
            head = Head(
                weight=weight,
                vocab_start=rows.start,
                vocab_size=VOCAB,
                temperature=TEMPERATURE,
                tp_group=dist.group.WORLD,
                sequence_parallel=sequence_parallel,
            )
            loss, metrics = path.loss(hidden, head, c)
            (loss * 3).backward()
            values = path.values(hidden, head, c)
            results[f"{path}, SP {sequence_parallel}"] = {
                "values": torch.stack(values),
                "loss": loss.detach(),
                "sums": metrics.sums,
                "d_hidden": hidden.grad,
                "d_weight": weight.grad,
            }
    torch.save(results, folder / f"{tp}.{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{TP size: {path and SP: {name: whole tensor}}}"""
    folder = tmp_path_factory.mktemp("tp")
    gathered = {}
    for tp in SIZES:
        mp.spawn(_run, args=(tp, folder), nprocs=tp)
        ranks = [torch.load(folder / f"{tp}.{rank}.pt") for rank in range(tp)]
        gathered[tp] = {}
        for name, first in ranks[0].items():
            for other in ranks[1:]:  # bit for bit: every rank goes on with the same numbers
                assert torch.equal(other[name]["values"], first["values"])
                assert torch.equal(other[name]["loss"], first["loss"])
            d_hidden = [rank[name]["d_hidden"] for rank in ranks]
            if "SP False" in name:
                assert all(torch.equal(d, d_hidden[0]) for d in d_hidden)
                d_hidden = d_hidden[:1]
            d_weight = torch.cat([rank[name]["d_weight"] for rank in ranks])
            gathered[tp][name] = {**first, "d_hidden": torch.cat(d_hidden), "d_weight": d_weight}
    return gathered


@pytest.mark.parametrize("tp", SIZES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_equals_the_plain_reference(path, sequence_parallel, tp, results):
    got, want = results[tp][f"{path}, SP {sequence_parallel}"], path.reference(_case(), VOCAB, TEMPERATURE)
    assert len(got["values"]) == len(want.values)
    for value, expected, limit in zip(got["values"], want.values, (1e-5, 5e-6, 1e-5), strict=False):
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=limit)
    torch.testing.assert_close(got["loss"].double(), want.loss, rtol=1e-6, atol=1e-6)
    for name, value in want.metrics.sums.items():
        torch.testing.assert_close(got["sums"][name].double(), value.double(), rtol=1e-5, atol=1e-5)
    assert max_relative_error(got["d_hidden"], 3 * want.d_hidden) < 5e-6
    assert max_relative_error(got["d_weight"], 3 * want.d_weight) < 5e-6


@pytest.mark.parametrize("tp", SIZES[1:])
def test_equals_one_process_to_1e_6(tp, results):
    for name, got in results[tp].items():
        alone = results[1][name]
        for field in ("values", "loss", "d_hidden", "d_weight"):
            assert max_relative_error(got[field], alone[field].double()) < 1e-6, f"TP {tp}: {name}: {field}"
