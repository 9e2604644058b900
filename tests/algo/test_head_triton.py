"""The Triton kernels against the torch functions they replace: under the interpreter, and on a GPU if there is one."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_t1.algo.head import fused, tile_math
from megatron_t1.algo.head.layout import Head
from megatron_t1.algo.head.tile_math import Tile
from megatron_t1.algo.loss import TokenFields
from tests.algo.reference import PATHS, case, max_relative_error

WIDTHS = (2100, 300)


def compare(device: str) -> None:
    """Both implementations over two uneven tiles: ordinary, huge and one-hot logits, fp32 and bf16 gradients."""
    g = torch.Generator().manual_seed(0)
    num_tokens = 5
    targets = torch.tensor([0, 2099, 2100, 2399, 5000], device=device)
    normal = torch.randn(num_tokens, sum(WIDTHS), generator=g)
    one_hot = torch.full_like(normal, -1e4).index_put(
        (torch.arange(5), torch.tensor([0, 5, 2100, 7, 2399])), normal[0, 0]
    )
    grads = tuple(torch.randn(num_tokens, generator=g).to(device) for _ in range(2))
    for logits, scale in ((3 * normal, 0.8), (1e4 * normal, 1 / 5.0), (one_hot, 1 / 0.05)):
        _compare(logits.to(device), scale, targets, grads)
    _compare(normal[:0].to(device), 1.0, targets[:0], tuple(g[:0] for g in grads))


def _compare(logits, scale, targets, grads) -> None:
    from megatron_t1.algo.head import triton_math

    def tiles():
        for z, column in zip(logits.split(WIDTHS, dim=1), (0, WIDTHS[0]), strict=True):
            yield Tile(z=z.clone(memory_format=torch.contiguous_format), scale=scale, column=column, targets=targets)

    stats = {m: m.new_statistics(len(targets), logits) for m in (triton_math, tile_math)}
    for module, s in stats.items():
        for tile in tiles():
            module.update_statistics(s, [tile])
    assert torch.isfinite(stats[triton_math][:3]).all()
    torch.testing.assert_close(stats[triton_math], stats[tile_math], rtol=1e-6, atol=1e-6)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):  # the interpreter truncates to bf16
        for mine, theirs in zip(tiles(), tiles(), strict=True):
            got = triton_math.logits_to_gradient(stats[tile_math], grads, [mine], dtype)
            want = tile_math.logits_to_gradient(stats[tile_math], grads, [theirs], dtype)
            assert got.dtype == want.dtype == dtype
            torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6)


def whole_paths(device: str) -> None:
    """Every differentiable path on the Triton kernels, where it uses them, against the float64 reference."""
    from megatron_t1.algo.head import triton_math

    fused.tile_math = triton_math
    c = case(s=9, hidden_size=16, vocab_size=600, num_targets=6)
    there = replace(c, **{k: v.to(device) for k, v in vars(c).items() if isinstance(v, torch.Tensor)})
    there.tokens = TokenFields(**{name: value.to(device) for name, value in vars(c.tokens).items()})
    for path in PATHS if device == "cuda" else PATHS[:2]:
        want = path.reference(c, 600, 0.8)
        hidden, weight = (t.detach().requires_grad_() for t in (there.hidden, there.weight))
        loss, _ = path.loss(hidden, Head(weight=weight, vocab_size=600, temperature=0.8), there)
        got = torch.autograd.grad(loss, (hidden, weight))
        for a, b in zip(got, (want.d_hidden, want.d_weight), strict=True):
            assert max_relative_error(a.cpu(), b) < 5e-6


def test_under_the_interpreter():
    pytest.importorskip("triton")
    # A process of its own: Triton reads the variable when it is imported.
    subprocess.run(
        [sys.executable, "-c", "from tests.algo.test_head_triton import *; compare('cpu'); whole_paths('cpu')"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=600,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    compare("cuda")
    whole_paths("cuda")
