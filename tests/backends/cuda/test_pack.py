"""Active channels packed side by side, or one row each, thread by thread."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_on_cpu.emulator import MODES, Run
from tests.support.cuda_cases import DTYPES, SMALLEST, library, poisoned
from tests.support.gpu_cases import MASKS, assert_gradient, channels


def pack(rows, chosen, *, most=None, transposed=False, blocks=2, mode=MODES[0], kernels=None):
    (t, k), dtype = rows.shape, DTYPES[rows.dtype]
    most = max(1, chosen.n_active) if most is None else most
    multiple = 16 // rows.element_size()
    stride = -(-(t if transposed else most) // multiple) * multiple
    packed = poisoned(most if transposed else t, stride, dtype=rows.dtype)
    sums = poisoned(blocks, most)
    order, count = chosen.order(), chosen.count("cpu")
    run = Run(
        kernels or library(),
        mode,
        {"rows": rows, "order": order, "count": count},
        {"packed": packed, "sums": sums},
        SMALLEST,
    )
    launches = run.call(
        *("neq_cuda_pack", dtype, rows, k, order, count, packed, stride, sums, blocks, t, most),
        *(int(transposed), None),
    )
    n = chosen.n_active
    return (packed[:n, :t].t() if transposed else packed[:, :n]), sums[:, :n].sum(0), launches


def check(t, k, dtype, mask, **how):
    rows = torch.randn(t, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    chosen = channels(k, mask) if isinstance(mask, str) else mask
    packed, sums, launches = pack(rows, chosen, **how)
    assert torch.equal(packed, rows[:, chosen.active])
    if chosen.n_active:
        exact = rows[:, chosen.active].double().sum(0)
        assert_gradient(sums, exact, channels(chosen.n_active, "all"), t)
    return launches


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_mask(dtype, mask, transposed):
    for t, k in ((1, 8), (75, 40), (40, 304)):
        check(t, k, dtype, mask, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_whatever_runs_first(mode, transposed):
    check(200, 264, torch.float16, "random", transposed=transposed, mode=mode, blocks=3)


def test_fewer_active_than_provided_for():
    for mask in ("none", "one", "random"):
        check(50, 160, torch.bfloat16, mask, most=160)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_what_has_to_move_moves_once(share, transposed):
    """Within 1.1 of the sectors that hold an active channel, and of what is written."""
    t, k = 512, 512
    chosen = channels(k, "random")
    generator = torch.Generator().manual_seed(3)
    chosen.set(torch.randperm(k, generator=generator)[: round(share * k)])
    launches = check(t, k, torch.float16, chosen, transposed=transposed)
    sectors = len({i // 16 for i in chosen.active.tolist()})
    least = sectors * 32 * t + 2 * chosen.n_active * t
    moved = sum(launch.total.moved_bytes for launch in launches)
    assert least <= moved <= 1.1 * least
