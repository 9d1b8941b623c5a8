"""SGD and Adam steps of active neurons, against the row steps in plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from neq_kernels.backends.triton import row_steps
from neq_kernels.channels import ActiveChannels
from neq_kernels.optim import attach, reference
from neq_kernels.optim import row_steps as row_steps_module
from tests.support.arrange import assert_as_precise_as_torch, bits
from tests.support.backends import triton
from tests.support.gpu_cases import DTYPES
from tests.support.optimizer_nets import make_net, random_masks, set_gradients
from tests.support.row_step_cases import (
    ADAM,
    ADAM_FLAGS,
    AMSGRAD,
    COUNTED,
    MOMENTUM,
    PARAMETERS,
    ROWS,
    SGD_FLAGS,
    Case,
)

MASKS = ("none", "one", "all", "random")


def step_together(
    cases: list[Case], function: str, state: tuple[str | None, ...], flags: dict
) -> None:
    names = ("param", "grad", *state, "order", "n")
    lists = [[getattr(case, name) for case in cases] if name else [] for name in names]
    getattr(triton, function)(*lists, [i for case in cases for i in case.blocks], **flags)


def assert_steps(
    cases: list[Case], function: str, state: tuple[str | None, ...], flags: dict
) -> None:
    """One call for all is every parameter's own plain step; frozen neurons keep their bits."""
    ours = [case.copy() for case in cases]
    step_together(ours, function, state, flags)
    for case, mine in zip(cases, ours, strict=True):
        torchs, exact = case.copy(), case.copy(torch.float64)
        for other in (torchs, exact):
            other.plain_step(function, state, flags)
        assert torch.equal(mine.steps, exact.steps)
        active, frozen = (
            some.to(mine.order) for some in (case.channels.active, case.channels.frozen)
        )
        of = case.layout.gather
        for old, new, low, high in zip(
            *(c.tensors() for c in (case, mine, torchs, exact)), strict=True
        ):
            assert torch.equal(bits(of(new, frozen)), bits(of(old, frozen)))
            assert_as_precise_as_torch(of(new, active), of(low, active), of(high, active))


@pytest.fixture
def launches(monkeypatch):
    """Name, arguments and keyword arguments of every launch."""
    seen = []

    class Recorder:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(row_steps, name)

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                seen.append((self.kernel, args, kwargs))
                self.kernel[grid](*args, **kwargs)

            return launch

    for name in ("sgd_kernel", "adam_kernel"):
        monkeypatch.setattr(row_steps, name, Recorder(name))
    return seen


def all_cases(dtype: torch.dtype, device: str, mask: str = "random") -> list[Case]:
    return [Case(i, dtype, device, mask) for i in range(len(PARAMETERS))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_sgd(mask, dtype, device):
    flags = {**SGD_FLAGS, "dampening": 0.3, "weight_decay": 0.1}
    assert_steps(all_cases(dtype, device, mask), "sgd_rows_", COUNTED, flags)


@pytest.mark.parametrize(
    ("state", "flags"),
    [
        ((None, None), {"momentum": 0.0}),
        ((None, None), {"momentum": 0.0, "weight_decay": 0.1, "maximize": True}),
        (MOMENTUM, {}),
        (MOMENTUM, {"dampening": 0.4, "weight_decay": 0.1, "maximize": True}),
        (MOMENTUM, {"nesterov": True, "weight_decay": 0.1}),
        (COUNTED, {"dampening": 0.4, "maximize": True}),
        (COUNTED, {"lr": 1.0, "momentum": 1.0}),
    ],
    ids=str,
)
def test_flags_of_sgd(state, flags, device):
    assert_steps(all_cases(torch.float32, device), "sgd_rows_", state, {**SGD_FLAGS, **flags})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_adam(mask, dtype, device):
    flags = {**ADAM_FLAGS, "weight_decay": 0.1, "decoupled": True}
    assert_steps(all_cases(dtype, device, mask), "adam_rows_", AMSGRAD, flags)


@pytest.mark.parametrize(
    ("state", "flags"),
    [
        (ADAM, {}),
        (ADAM, {"weight_decay": 0.1, "maximize": True}),
        (ADAM, {"weight_decay": 0.1, "decoupled": True, "eps": 1e-3}),
        (AMSGRAD, {"weight_decay": 0.1}),
        (AMSGRAD, {"beta1": 0.0, "beta2": 0.5, "lr": 1.0}),
    ],
    ids=str,
)
def test_flags_of_adam(state, flags, device):
    assert_steps(all_cases(torch.float32, device), "adam_rows_", state, {**ADAM_FLAGS, **flags})


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_bias_corrections_keep_their_digits(beta, device):
    """With everything else 0 a first gradient moves a weight by the two corrections alone."""
    before = torch.tensor([0, 1, 2, 5, 9, 99, 999, 10_000, 10**6, 2**31 + 7])
    k = len(before)
    order = torch.arange(k).to(device)
    param, grad, m, v, steps = (
        *(torch.full((k,), value).to(device) for value in (0.0, 1.0, 0.0, 0.0)),
        before.to(device, copy=True),
    )
    flags = {**ADAM_FLAGS, "beta1": beta, "beta2": beta, "eps": 1e-30, "lr": 1.0}
    lists = ([t] for t in (param, grad, m, v))
    triton.adam_rows_(*lists, [], [steps], [order], [k], (1, 1, k, 1), **flags)
    log = torch.log(torch.tensor(beta, dtype=torch.float64))
    exact = -((1 - beta) / -torch.expm1((before.double() + 1) * log)).sqrt()
    error = (param.double().cpu() / exact - 1).abs().max()
    assert error < 1e-6
    assert torch.equal(steps.cpu(), before + 1)


def test_nan_in_frozen_neurons_stays_there(device):
    cases = all_cases(torch.float32, device)
    for case in cases:
        for tensor in case.tensors():
            case.layout.fill_(tensor, case.channels.frozen.to(device), torch.nan)
    step_together(cases, "sgd_rows_", COUNTED, SGD_FLAGS)
    step_together(cases, "adam_rows_", AMSGRAD, ADAM_FLAGS)
    for case in cases:
        for tensor in case.tensors():
            assert case.layout.gather(tensor, case.channels.active.to(device)).isfinite().all()
            assert case.layout.gather(tensor, case.channels.frozen.to(device)).isnan().all()


def test_a_first_step_ignores_what_the_buffer_held(device):
    cases = [Case(i, torch.float32, device, "all") for i in (1, 3)]
    for case in cases:
        case.first[(case.steps == 0)] = torch.nan
    step_together(cases, "sgd_rows_", COUNTED, {**SGD_FLAGS, "dampening": 0.5})
    assert all(t.isfinite().all() for case in cases for t in case.tensors())


@pytest.mark.parametrize(
    ("function", "state", "flags"),
    [("sgd_rows_", MOMENTUM, SGD_FLAGS), ("adam_rows_", ADAM, ADAM_FLAGS)],
    ids=["sgd", "adam"],
)
def test_a_step_makes_saved_tensors_stale(function, state, flags, device):
    case = Case(1, torch.float32, device, "all")
    weight = case.param.requires_grad_()
    loss = (weight * weight).sum()
    with torch.no_grad():
        step_together([case], function, state, flags)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_all_parameters_take_one_launch_and_no_copy_is_made_twice(launches, device):
    cases = all_cases(torch.float32, device)
    for _ in range(2):
        step_together(cases, "sgd_rows_", COUNTED, SGD_FLAGS)
        step_together(cases, "adam_rows_", AMSGRAD, ADAM_FLAGS)
    assert len(launches) == 4
    for first, again in ((0, 2), (1, 3)):
        for before, now in zip(launches[first][1][:2], launches[again][1][:2], strict=True):
            assert before is now


def test_nothing_is_compiled_anew_for_other_masks_settings_and_parameters(launches, device):
    for mask, n_parameters in (("all", 1), ("one", 2), ("random", 16)):
        for lr in (0.1, 1.0, 16.0):
            flags = {"lr": lr, "weight_decay": lr}
            few = [Case(1 + i % 3, torch.float32, device, mask) for i in range(n_parameters)]
            step_together(few, "sgd_rows_", COUNTED, {**SGD_FLAGS, **flags, "maximize": lr > 1})
            step_together(few, "adam_rows_", AMSGRAD, {**ADAM_FLAGS, **flags, "decoupled": lr > 1})
    assert len(launches) == 18
    assert len({specialization(*launch) for launch in launches}) == 2


def specialization(kernel, args, kwargs) -> str:
    """What Triton compiles a kernel for."""
    compilable = kernel
    if not isinstance(kernel, JITFunction):  # the interpreter's
        compilable = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(compilable.signature, compilable.params, backend)
    _, special, _ = bind(*args, **kwargs)
    return f"{compilable.__name__} {special}"


OPTIMIZERS = {
    "SGD": lambda ps: SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "dampened SGD": lambda ps: SGD(ps, lr=0.05, momentum=0.9, dampening=0.3, maximize=True),
    "Adam": lambda ps: Adam(ps, lr=0.05, weight_decay=0.1, betas=(0.8, 0.97), amsgrad=True),
    "AdamW": lambda ps: AdamW(ps, lr=0.05, weight_decay=0.1, betas=(0.8, 0.97)),
}


def run(make, dtype, channels_last, frozen_state, device):
    net = make_net(dtype, channels_last).to(device)
    optimizer = make(net.parameters())
    attach(optimizer, net, frozen_state)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    masks, numbers = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for step in range(5):
        if step != 2:
            random_masks(net, masks)
        set_gradients(net, numbers)
        optimizer.step()
        schedule.step()
    state, counted = optimizer.state.values(), ("step", "neq_step")
    moments = [v for s in state for k, v in s.items() if isinstance(v, Tensor) and k not in counted]
    counts = [s[key].tolist() for s in state for key in counted if key in s]
    return [p.detach() for p in net.parameters()] + moments, counts


@pytest.mark.parametrize("frozen_state", ["reset", "keep", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_optimizers(name, channels_last, frozen_state, launches, device, monkeypatch):
    make, settings = OPTIMIZERS[name], (channels_last, frozen_state)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "sgd_rows_", None)
        patch.setattr(reference, "adam_rows_", None)
        ours, counts = run(make, torch.float32, *settings, device)
    assert len(launches) == 5
    monkeypatch.setattr(row_steps_module, "_backend", lambda tensors, layout: None)
    torchs, _ = run(make, torch.float32, *settings, "cpu")
    exact, expected_counts = run(make, torch.float64, *settings, "cpu")
    assert counts == expected_counts
    for mine, theirs, wanted in zip(ours, torchs, exact, strict=True):
        assert_as_precise_as_torch(mine.cpu(), theirs, wanted)


def test_what_cannot_be_served_is_left_to_plain_torch(device):
    p = torch.zeros(4, 3, 2, 2).to(device)
    assert row_steps_module._backend([p, p.clone()], ROWS) is triton
    assert row_steps_module._backend([p.bfloat16()] * 2, ROWS) is triton
    assert row_steps_module._backend([p.double()] * 2, ROWS) is None
    assert row_steps_module._backend([p.mT] * 2, ROWS) is None
    assert row_steps_module._backend([p, p.bfloat16()], ROWS) is None
    vast = torch.zeros(1).to(device).expand(2, 2**27)
    assert row_steps_module._backend([vast] * 2, ROWS) is None


def test_nothing_active_takes_no_launch(launches, device):
    step_together([Case(1, torch.float32, device, "none")], "adam_rows_", ADAM, ADAM_FLAGS)
    assert not launches


def test_a_changed_set_of_as_many_neurons_is_read_anew(device):
    """Neither the address of ``order`` nor anything else in the tables changes."""
    chosen = ActiveChannels(4)
    for active in ([0, 1], [1, 3]):
        chosen.set(active)
        case = Case(1, torch.float32, device)
        case.channels, case.order, case.n = chosen, chosen.order(device), 2
        assert_steps([case], "adam_rows_", ADAM, ADAM_FLAGS)
