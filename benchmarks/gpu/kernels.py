"""The head's Triton kernels and GEMMs against torch and float64, tiles of more than 2^31 logits included."""

from __future__ import annotations

import torch

from benchmarks.gpu.results import Check, relative


def kernels(check: Check) -> None:
    if check.smoke:
        check.report("skipped", None, why="kernels on the CPU are run by tests/algo/test_head_triton.py")
        return
    from tests.algo import test_head_triton

    for name, run in (("tile by tile", test_head_triton.compare), ("whole paths", test_head_triton.whole_paths)):
        with check.case(name):
            run("cuda")
            check.report(name, True)
    with check.case("GEMMs"):
        _gemms(check)
    with check.case("2.5e9 logits"):
        _large_tile(check)


def _gemms(check: Check) -> None:
    from megatron_t1.algo.head.gemm import add_matmul_, matmul

    a, b = (torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16) for rows in (96, 320))
    logits = matmul(a, b.t(), torch.empty(96, 320, device="cuda"))
    total = torch.randn(400, 128, device="cuda")
    before = total[40:360].clone()
    dz = torch.randn(96, 320, device="cuda", dtype=torch.bfloat16)
    add_matmul_(total[40:360], dz.t(), a, alpha=0.5)
    errors = (
        relative(logits, a.double() @ b.double().t()),
        relative(total[40:360] - before, 0.5 * (dz.double().t() @ a.double())),
    )
    check.report("GEMMs", max(errors) < 1e-5, logits_error=errors[0], sum_error=errors[1])


def _large_tile(check: Check) -> None:
    from megatron_t1.algo.head import tile_math, triton_math
    from megatron_t1.algo.head.tile_math import Tile

    num_tokens, width, last = 16384, 152064, slice(16380, 16384)
    z = torch.empty(num_tokens, width, device="cuda")
    for rows in z.split(1024):
        rows.normal_()
    targets = torch.randint(width, (num_tokens,), device="cuda")
    kept = z[last].clone()

    def few() -> list[Tile]:
        return [Tile(z=kept.clone(), scale=0.8, column=0, targets=targets[last])]

    stats, want = triton_math.new_statistics(num_tokens, z), tile_math.new_statistics(4, z)
    tiles = [Tile(z=z, scale=0.8, column=0, targets=targets)]
    triton_math.update_statistics(stats, tiles)
    tile_math.update_statistics(want, few())
    grads = tuple(torch.randn(num_tokens, device="cuda") for _ in range(2))
    dz = triton_math.logits_to_gradient(stats, grads, tiles, torch.bfloat16)
    exact = tile_math.logits_to_gradient(want, tuple(g[last] for g in grads), few(), torch.float32)
    errors = relative(stats[:, last], want), relative(dz[last], exact)
    check.report(
        "2.5e9 logits", errors[0] < 1e-5 and errors[1] < 1e-2, statistics_error=errors[0], gradient_error=errors[1]
    )
