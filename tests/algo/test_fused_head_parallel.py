"""The head over 1, 2 and 4 gloo processes: equal to the plain float64 reference, and to 1e-6 to one another."""

import pytest
import torch

from tests.algo.reference import PATHS, max_relative_error
from tests.forks import WORKERS
from tests.workers.head_worker import TEMPERATURE, VOCAB, one_case

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def results(run_ranks, tmp_path_factory):
    """{TP size: {path and SP: {name: whole tensor}}}"""
    folder = tmp_path_factory.mktemp("tp")
    gathered = {}
    for tp in SIZES:
        run_ranks(WORKERS / "head_worker.py", tp, folder)
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
    got, want = results[tp][f"{path}, SP {sequence_parallel}"], path.reference(one_case(), VOCAB, TEMPERATURE)
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
