"""The Triton kernels against the torch functions they replace: under the interpreter, and on a GPU if there is one."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_t1.algo.head import full_kl, fused, tile_math
from megatron_t1.algo.head.layout import Head
from megatron_t1.algo.head.tile_math import Tile
from megatron_t1.algo.loss import TokenFields
from tests.algo.reference import PATHS, case, max_relative_error

WIDTHS = (2100, 300)


def compare(device: str) -> None:
    """Both implementations over two uneven tiles: ordinary, huge and one-hot logits, fp32 and bf16 gradients."""
    from megatron_t1.algo.head import triton_full_kl, triton_math

    g = torch.Generator().manual_seed(0)
    num_tokens = 5
    targets = torch.tensor([0, 2099, 2100, 2399, 5000], device=device)
    normal = torch.randn(num_tokens, sum(WIDTHS), generator=g)
    one_hot = torch.full_like(normal, -1e4).index_put(
        (torch.arange(5), torch.tensor([0, 5, 2100, 7, 2399])), normal[0, 0]
    )
    grads = tuple(torch.randn(num_tokens, generator=g).to(device) for _ in range(3))
    anchor = (2 * torch.randn(num_tokens, sum(WIDTHS), generator=g)).to(device)
    for logits, scale in ((3 * normal, 0.8), (1e4 * normal, 1 / 5.0), (one_hot, 1 / 0.05)):
        policy = logits.to(device)
        _compare(triton_math, tile_math, [policy], scale, targets, grads[:2])
        _compare(triton_full_kl, full_kl, [policy, anchor], scale, targets, grads)
    none = [logits[:0] for logits in (normal.to(device), anchor)]
    _compare(triton_full_kl, full_kl, none, 1.0, targets[:0], [g[:0] for g in grads])


def _compare(kernels, torch_math, models, scale, targets, grads) -> None:
    def tiles():
        """Of each half of the vocabulary, the policy's and, for the full KL, the anchor's."""
        for column, *parts in zip((0, WIDTHS[0]), *(logits.split(WIDTHS, dim=1) for logits in models), strict=True):
            copies = [z.clone(memory_format=torch.contiguous_format) for z in parts]
            yield [Tile(z=z, scale=scale, column=column, targets=targets) for z in copies]

    stats = {module: module.new_statistics(len(targets), models[0]) for module in (kernels, torch_math)}
    for module, s in stats.items():
        for pair in tiles():
            module.update_statistics(s, pair)
    assert torch.isfinite(stats[kernels][:3]).all()
    torch.testing.assert_close(stats[kernels], stats[torch_math], rtol=2e-6, atol=1e-6)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):  # the interpreter truncates to bf16
        for mine, theirs in zip(tiles(), tiles(), strict=True):
            got = kernels.logits_to_gradient(stats[torch_math], grads, mine, dtype)
            want = torch_math.logits_to_gradient(stats[torch_math], grads, theirs, dtype)
            assert got.dtype == want.dtype == dtype
            largest = float(want.abs().max()) if want.numel() else 0.0
            torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6 * max(largest, 1.0))


def whole_paths(device: str) -> None:
    """Every differentiable path on the Triton kernels, where it uses them, against the float64 reference."""
    from megatron_t1.algo.head import triton_full_kl, triton_math

    fused.tile_math, fused.full_kl = triton_math, triton_full_kl
    c = case(s=9, hidden_size=16, vocab_size=600, num_targets=6)
    there = replace(c, **{k: v.to(device) for k, v in vars(c).items() if isinstance(v, torch.Tensor)})
    there.tokens = TokenFields(**{name: value.to(device) for name, value in vars(c.tokens).items()})
    for path in PATHS:
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
