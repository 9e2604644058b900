"""The head over 2 and 4 gloo processes equals the plain float64 reference, with and without sequence parallelism."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_t1.algo import fused_head
from megatron_t1.algo.full_kl import logprob_entropy_kl
from megatron_t1.algo.fused_head import fused_loss, logprob_entropy, logprob_entropy_nograd
from megatron_t1.algo.head import Head
from megatron_t1.algo.loss import LossConfig, t1_token_loss
from tests.algo.reference import case, max_relative_error, reference_loss

CFG = LossConfig(entropy_coef=0.1, kl_coef=0.1)


def _token_loss(logprob, entropy, tokens):
    return t1_token_loss(logprob, entropy, tokens, CFG)


def _check(rank: int, tp: int, init_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=tp)
    # Small tiles and chunks; the last rank of four holds nothing but padding rows.
    fused_head.CHUNK_LOGITS["cpu"] = 2000
    s, vocab_size, rows = 64, 601, 1024 // tp
    full = case(s=s, hidden_size=32, vocab_size=vocab_size, padded_size=1024, num_targets=37)
    want = reference_loss(full, vocab_size, 0.8, CFG)

    for sequence_parallel in (False, True):
        part = slice(rank * s // tp, (rank + 1) * s // tp) if sequence_parallel else slice(0, s)
        mine = slice(rank * rows, (rank + 1) * rows)
        for path in ("general", "fused"):
            hidden = full.hidden[part].clone().requires_grad_()
            weight = full.weight[mine].clone().requires_grad_()
            head = Head(
                weight=weight,
                vocab_start=rank * rows,
                vocab_size=vocab_size,
                temperature=0.8,
                tp_group=dist.group.WORLD,
                sequence_parallel=sequence_parallel,
            )
            if path == "general":
                logprob, entropy = logprob_entropy(hidden, head, full.positions, full.targets)
                again = logprob_entropy_nograd(hidden, head, full.positions, full.targets)
                assert torch.equal(again[0], logprob)
                assert torch.equal(again[1], entropy)
                torch.testing.assert_close(logprob.double(), want.logprob, rtol=0, atol=1e-5)
                torch.testing.assert_close(entropy.double(), want.entropy, rtol=0, atol=5e-6)
                loss = _token_loss(logprob, entropy, full.tokens)[0].sum()
            else:
                loss, metrics = fused_loss(hidden, head, full.positions, full.targets, _token_loss, full.tokens)
                for name, value in want.metrics.sums.items():
                    torch.testing.assert_close(metrics.sums[name].double(), value.double(), rtol=1e-5, atol=1e-5)
            (loss * 3).backward()
            torch.testing.assert_close(loss.double(), want.loss, rtol=1e-6, atol=1e-6)
            assert max_relative_error(hidden.grad, 3 * want.d_hidden[part]) < 5e-6
            assert max_relative_error(weight.grad, 3 * want.d_weight[mine]) < 5e-6
    hidden, weight = (t.clone().requires_grad_() for t in (full.hidden, full.weight[mine]))
    anchor = case(s=s, hidden_size=32, vocab_size=vocab_size, padded_size=1024, num_targets=37, seed=1)
    head, anchor_head = (
        Head(weight=w, vocab_start=rank * rows, vocab_size=vocab_size, temperature=0.8, tp_group=dist.group.WORLD)
        for w in (weight, anchor.weight[mine])
    )
    kl = logprob_entropy_kl(hidden, head, anchor.hidden, anchor_head, full.positions, full.targets)[2]
    kl.sum().backward()
    h, w = full.hidden.double().requires_grad_(), full.weight.double().requires_grad_()
    logp = torch.log_softmax(h[full.positions] @ w[:vocab_size].T / 0.8, -1)
    logq = torch.log_softmax(anchor.hidden.double()[full.positions] @ anchor.weight.double()[:vocab_size].T / 0.8, -1)
    want_kl = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    want_kl.sum().backward()
    torch.testing.assert_close(kl.double(), want_kl, rtol=1e-6, atol=5e-6)
    assert max_relative_error(hidden.grad, h.grad) < 5e-6
    assert max_relative_error(weight.grad, w.grad[mine]) < 5e-6
    dist.destroy_process_group()


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_and_sequence_parallel(tp, tmp_path):
    mp.spawn(_check, args=(tp, str(tmp_path / "init")), nprocs=tp)
