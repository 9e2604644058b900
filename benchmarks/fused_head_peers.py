"""Other projects' output-layer losses under one signature, for `fused_head.py --peers`: those installed beside us.

Each takes (hidden [T, H], weight [V, H], targets [T], temperature) and returns logprob [T] and entropy [T] with
gradients. They are imported, never copied; what is not installed is left out of the table.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def trl_full(hidden, weight, targets, temperature):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(hidden @ weight.t(), targets, temperature=temperature)


def trl_chunked(hidden, weight, targets, temperature):
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    return _ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, temperature, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )[:2]


def verl_fused(hidden, weight, targets, temperature):
    module = _verl("utils/experimental/torch_functional.py")
    return module.FusedLinearForPPO()(hidden, weight, targets, temperature)


def verl_triton(hidden, weight, targets, temperature):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, temperature, "none", None)


def liger(hidden, weight, targets, temperature):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, temperature, -100, 1, True)
    return -nll, entropy


PEERS = {
    # GEMMs it needs at least, devices, installed as
    "trl_full": (trl_full, 3, ("cpu", "cuda"), "trl"),
    "trl_chunked": (trl_chunked, 4, ("cpu", "cuda"), "trl"),
    "verl_fused": (verl_fused, 4, ("cpu", "cuda"), "verl"),
    "verl_triton": (verl_triton, 4, ("cuda",), "verl"),
    "liger": (liger, 4, ("cuda",), "liger_kernel"),
}


def installed(device: str) -> list[str]:
    return [
        name
        for name, (_, _, devices, package) in PEERS.items()
        if device in devices and importlib.util.find_spec(package)
    ]


def _verl(file: str):
    """One file of verl by its path: importing the package would want Ray."""
    spec = importlib.util.find_spec("verl")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
