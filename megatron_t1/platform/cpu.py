"""What Megatron-Core 0.16.1 asks of CUDA, answered on a machine that has none.

Megatron's own code runs unchanged; only torch.cuda's questions get CPU answers: the current device is the CPU, a
`cuda` device keyword means the CPU, streams and synchronisation are no-ops, and the CUDA generator is the CPU's. What
is left out: anything that would pretend to be faster or to have memory statistics; `torch.cuda.is_available()` stays
False.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_t1.platform import gloo

_CPU = torch.device("cpu")
# Megatron's optimizers recognise a parameter's precision by the spelling of its CUDA type.
_CUDA_TYPE = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
}
_CONSTRUCTORS = ("arange", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros")


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(construct: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(construct)
    def constructed(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return construct(*args, **kwargs)

    return constructed


def _with_cuda_spelling(type_of: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(type_of)
    def spelled(*args: Any, **kwargs: Any) -> Any:
        found = type_of(*args, **kwargs)
        return _CUDA_TYPE.get(found, found) if len(args) == 1 and not kwargs else found

    return spelled


class _NoStream:
    """Stands for a CUDA stream and for an event in one: everything on the CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None:
        pass


def _answer(value: Any = None) -> Callable[..., Any]:
    """A new function that takes anything and answers `value`. New each time: torch's compiler refuses to find one
    function under two of torch.cuda's names."""
    return lambda *args, **kwargs: value


def _get_cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(state)


def install() -> None:
    """Answer torch.cuda's questions with the CPU's answers, for this process."""
    cuda: Any = torch.cuda
    cuda.current_device = _answer(_CPU)
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _answer())
    cuda.Stream = _NoStream  # a class: annotations such as `torch.cuda.Stream | None` are evaluated
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _answer(_NoStream()))
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args, **kwargs: _get_cpu_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: _set_cpu_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    gloo.install()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _with_cuda_spelling(tensor.type)
    # The context `torch.device(...)` collects the constructors at its first call, and must know the original ones:
    # transformers builds a model to be loaded in torch.device("meta").
    with _CPU:
        torch.empty(0)
    # One by one: a TorchFunctionMode would see every call, which takes a sixth of a tiny model's step.
    for name in _CONSTRUCTORS:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    import megatron.core.tensor_parallel.random as megatron_random

    patched: Any = megatron_random
    patched._get_cuda_rng_state = _get_cpu_rng_state
    patched._set_cuda_rng_state = _set_cpu_rng_state
    patched.device_ctx_manager = lambda device: contextlib.nullcontext()
