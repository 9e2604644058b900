"""The tiny checkpoints and what our engine and transformers make of them, once a session."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.forks import WORKERS
from tests.models.families import FAMILIES, YARN, reference
from tests.models.layouts import LAYOUTS

WORKER = WORKERS / "parity_worker.py"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, make in (FAMILIES | YARN).items():
        make(folder / name)
    return folder


@pytest.fixture(scope="session")
def results(checkpoints, run_ranks, tmp_path_factory):
    """number of ranks -> folder of results; all layouts of one number of ranks share the start of the processes."""

    @functools.cache
    def run(num_ranks: int) -> Path:
        out = tmp_path_factory.mktemp("results")
        layouts = {name: (fields, sorted(families)) for name, (fields, families) in LAYOUTS[num_ranks].items()}
        try:
            run_ranks(WORKER, num_ranks, checkpoints, out, json.dumps(layouts), timeout_s=3000)
        except AssertionError as error:
            print(error)  # what was written before is compared all the same
        return out

    return run


@pytest.fixture(scope="session")
def expected(checkpoints):
    return functools.cache(lambda family: reference(checkpoints / family))
