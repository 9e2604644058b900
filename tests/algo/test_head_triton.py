"""The Triton kernels against the torch functions they replace: under the interpreter, and on a GPU if there is one."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_t1.algo import fused_head, head_tiles
from megatron_t1.algo.head import Head
from megatron_t1.algo.loss import LossConfig, TokenFields, t1_token_loss
from tests.algo.reference import case, max_relative_error, reference_loss


def compare(device: str) -> None:
    """Both implementations over two uneven tiles, in fp32 and bf16 gradients, ordinary and huge logits."""
    from megatron_t1.algo import head_triton

    g = torch.Generator().manual_seed(0)
    num_tokens, widths = 5, (2100, 300)
    for magnitude in (3.0, 1e4):
        logits = (torch.randn(num_tokens, sum(widths), generator=g) * magnitude).to(device)
        targets = torch.tensor([0, 2099, 2100, 2399, 5000], device=device)
        grads = [torch.randn(num_tokens, generator=g).to(device) for _ in range(2)]
        stats = {m: head_tiles.new_statistics(num_tokens, logits) for m in (head_triton, head_tiles)}
        for module, s in stats.items():
            for z, column in zip(logits.split(widths, dim=1), (0, widths[0]), strict=True):
                module.update_statistics(s, z.clone(memory_format=torch.contiguous_format), 0.8, column, targets)
        torch.testing.assert_close(stats[head_triton], stats[head_tiles], rtol=1e-6, atol=1e-6)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):  # the interpreter truncates to bf16
            for z, column in zip(logits.split(widths, dim=1), (0, widths[0]), strict=True):
                got, want = (
                    module.logits_to_gradient(
                        z.clone(memory_format=torch.contiguous_format),
                        0.8, None, stats[head_tiles], column, targets, *grads, dtype,
                    )
                    for module in (head_triton, head_tiles)
                )  # fmt: skip
                assert got.dtype == want.dtype == dtype
                torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6)


def whole_paths(device: str) -> None:
    """Both differentiable paths on the Triton kernels against the float64 reference."""
    from megatron_t1.algo import head_triton

    fused_head.for_device = lambda _: head_triton
    c = case(s=9, hidden_size=16, vocab_size=600, num_targets=6)
    want = reference_loss(c, 600, 0.8, LossConfig())

    def token_loss(logprob, entropy, tokens):
        return t1_token_loss(logprob, entropy, tokens, LossConfig())

    tokens = TokenFields(**{name: value.to(device) for name, value in vars(c.tokens).items()})
    positions, targets = c.positions.to(device), c.targets.to(device)
    for path in ("general", "fused"):
        hidden, weight = (t.to(device).requires_grad_() for t in (c.hidden, c.weight))
        head = Head(weight=weight, vocab_size=600, temperature=0.8)
        if path == "general":
            outputs = fused_head.logprob_entropy(hidden, head, positions, targets)
            loss = token_loss(*outputs, tokens)[0].sum()
        else:
            loss, _ = fused_head.fused_loss(hidden, head, positions, targets, token_loss, tokens)
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
        timeout=240,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    compare("cuda")
    whole_paths("cuda")
