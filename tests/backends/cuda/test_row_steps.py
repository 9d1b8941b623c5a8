"""SGD and Adam steps of active neurons, thread by thread, against plain torch in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from neq_kernels.backends import gpu_base
from neq_kernels.channels import NeuronLayout
from tests.cuda_on_cpu.emulator import MODES, EmulationError, Launch, Library, Mode, Run, build
from tests.support.arrange import assert_as_precise_as_torch, bits
from tests.support.cuda_cases import DTYPES, FOLDER
from tests.support.gpu_cases import MASKS, channels
from tests.support.row_step_cases import (
    ADAM,
    ADAM_FLAGS,
    AMSGRAD,
    COUNTED,
    MOMENTUM,
    PARAMETERS,
    SGD_FLAGS,
    Case,
)

SGD_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
ADAM_NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")


def library(*replace: tuple[str, str, str]) -> Library:
    return build([FOLDER / "optim" / "row_steps.cu"], replace=replace)


def step_together(
    cases: list[Case],
    function: str,
    state: tuple[str | None, ...],
    flags: dict,
    mode: Mode = MODES[0],
    kernels: Library | None = None,
) -> list[Launch]:
    names = ("param", "grad", *state, "order")
    tensors = [[getattr(case, name) if name else None for name in names] for case in cases]
    blocks, shapes = gpu_base._cut(
        tuple(case.n for case in cases),
        tuple(i for case in cases for i in case.blocks),
        torch.device("cpu"),
    )
    addresses = torch.tensor([[0 if t is None else t.data_ptr() for t in of] for of in tensors])
    reads, writes = {"addresses": addresses, "shapes": shapes}, {}
    for i, of in enumerate(tensors):
        for name, tensor in zip(names, of, strict=True):
            if tensor is not None:
                (reads if name in ("grad", "order") else writes)[f"{name} {i}"] = tensor
    run = Run(kernels or library(), mode, reads, writes)
    is_sgd = function == "sgd_rows_"
    numbers = [ctypes.c_double(flags[name]) for name in (SGD_NUMBERS if is_sgd else ADAM_NUMBERS)]
    kind = (state[0] is not None, flags["nesterov"]) if is_sgd else (None not in state,)
    last = (flags["maximize"],) if is_sgd else (flags["decoupled"], flags["maximize"])
    return run.call(
        *(f"neq_cuda_{function[:-1]}", DTYPES[cases[0].param.dtype], addresses, shapes),
        *(len(cases), blocks, *numbers, *kind, *last, None),
    )


def assert_steps(cases, function, state, flags, **how) -> list[Case]:
    """One launch for all is every parameter's own plain step; frozen neurons keep their bits."""
    ours = [case.copy() for case in cases]
    step_together(ours, function, state, flags, **how)
    for case, mine in zip(cases, ours, strict=True):
        torchs, exact = case.copy(), case.copy(torch.float64)
        for other in (torchs, exact):
            other.plain_step(function, state, flags)
        assert torch.equal(mine.steps, exact.steps)
        of = case.layout.gather
        for old, new, low, high in zip(
            *(c.tensors() for c in (case, mine, torchs, exact)), strict=True
        ):
            frozen, active = case.channels.frozen, case.channels.active
            assert torch.equal(bits(of(new, frozen)), bits(of(old, frozen)))
            assert_as_precise_as_torch(of(new, active), of(low, active), of(high, active))
    return ours


def all_cases(dtype: torch.dtype, mask: str = "random") -> list[Case]:
    return [Case(i, dtype, "cpu", mask) for i in range(len(PARAMETERS))]


DAMPENED = {**SGD_FLAGS, "dampening": 0.3, "weight_decay": 0.1}
DECOUPLED = {**ADAM_FLAGS, "weight_decay": 0.1, "decoupled": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_every_dtype_and_mask(mask, dtype):
    assert_steps(all_cases(dtype, mask), "sgd_rows_", COUNTED, DAMPENED)
    assert_steps(all_cases(dtype, mask), "adam_rows_", AMSGRAD, DECOUPLED)


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
def test_flags_of_sgd(state, flags):
    assert_steps(all_cases(torch.float32), "sgd_rows_", state, {**SGD_FLAGS, **flags})


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
def test_flags_of_adam(state, flags):
    assert_steps(all_cases(torch.float32), "adam_rows_", state, {**ADAM_FLAGS, **flags})


def test_bits_do_not_depend_on_the_order_of_threads():
    for function, state, flags in (
        ("sgd_rows_", COUNTED, DAMPENED),
        ("adam_rows_", AMSGRAD, DECOUPLED),
    ):
        first, *others = [
            assert_steps(all_cases(torch.float16), function, state, flags, mode=mode)
            for mode in MODES
        ]
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                for one, two in zip(mine.tensors(), theirs.tensors(), strict=True):
                    assert torch.equal(bits(one), bits(two))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_bias_corrections_keep_their_digits(beta):
    """With everything else 0 a first gradient moves a weight by the two corrections alone."""
    before = torch.tensor([0, 1, 2, 5, 9, 99, 999, 10_000, 10**6, 2**31 + 7])
    case = Case(0, torch.float32, "cpu", "all")
    k = len(before)
    case.param, case.grad = torch.zeros(k), torch.ones(k)
    case.first, case.second, case.steps = torch.zeros(k), torch.zeros(k), before.clone()
    case.order, case.n, case.blocks = torch.arange(k), k, (1, 1, k, 1)
    flags = {**ADAM_FLAGS, "beta1": beta, "beta2": beta, "eps": 1e-30, "lr": 1.0}
    step_together([case], "adam_rows_", ADAM, flags)
    log = torch.log(torch.tensor(beta, dtype=torch.float64))
    exact = -((1 - beta) / -torch.expm1((before.double() + 1) * log)).sqrt()
    assert (case.param.double() / exact - 1).abs().max() < 1e-6
    assert torch.equal(case.steps, before + 1)


def test_nan_in_frozen_neurons_stays_there():
    cases = all_cases(torch.float32)
    for case in cases:
        for tensor in case.tensors():
            case.layout.fill_(tensor, case.channels.frozen, torch.nan)
    step_together(cases, "sgd_rows_", COUNTED, SGD_FLAGS)
    step_together(cases, "adam_rows_", AMSGRAD, ADAM_FLAGS)
    for case in cases:
        for tensor in case.tensors():
            assert case.layout.gather(tensor, case.channels.active).isfinite().all()
            assert case.layout.gather(tensor, case.channels.frozen).isnan().all()


def test_a_first_step_ignores_what_the_buffer_held():
    cases = [Case(i, torch.float32, "cpu", "all") for i in (1, 3)]
    for case in cases:
        case.first[(case.steps == 0)] = torch.nan
    step_together(cases, "sgd_rows_", COUNTED, {**SGD_FLAGS, "dampening": 0.5})
    assert all(t.isfinite().all() for case in cases for t in case.tensors())


def of_shape(shape: tuple[int, ...], dtype: torch.dtype, mask: str) -> Case:
    case = Case(1, dtype, "cpu")
    tensors: list[Tensor] = [torch.rand(shape).to(dtype) for _ in range(5)]
    case.param, case.grad, case.first, case.second, case.largest = tensors
    case.steps, case.channels = torch.arange(shape[0]), channels(shape[0], mask)
    case.order, case.n = case.channels.order(), case.channels.n_active
    case.layout, case.blocks = NeuronLayout(), NeuronLayout().blocks(case.param)
    return case


@pytest.mark.parametrize("mask", ["all", "contiguous", "random"])
@pytest.mark.parametrize("inner", [64, 144, 1024])
def test_active_neurons_are_read_and_written_once(inner, mask):
    """Within 1.05 of them where a neuron is whole sectors, 16 bytes at a time."""
    for dtype in DTYPES:
        shape = (4096 // inner, inner)
        for function, state, flags, tensors in (
            ("sgd_rows_", COUNTED, DAMPENED, 5),
            ("adam_rows_", AMSGRAD, DECOUPLED, 9),
        ):
            case = of_shape(shape, dtype, mask)
            (launch,) = step_together([case], function, state, flags)
            names = ("param 0", "grad 0", "first 0", "second 0", "largest 0")
            regions = [launch.regions[name] for name in names if name in launch.regions]
            moved = sum(region.moved_bytes for region in regions)
            size = case.param.element_size()
            assert moved == tensors * case.n * inner * size
            wide = [r.loads for r in regions] + [r.stores for r in regions if r.stores.requests]
            assert all(w.bytes / w.requests > 16 * 4 for w in wide)


BARRIER = "__syncthreads();\n  const int64_t together = address[0] | address[1] | (k"
FAULTS = {
    "first step taken for another": ("neurons[i].is_first != 0", "false"),
    "missing weight decay": ("+ s.weight_decay * value;\n      if", ";\n      if"),
    "sgd: steps not counted": ("steps[neuron] = before + 1", "steps[neuron] = before"),
    "adam: count one behind": ("count = steps[neuron] + 1", "count = steps[neuron]"),
    "cancelled digits": ("-expm1f(log_beta", "1.0f - expf(log_beta"),
    "wrong neuron": ("neuron = part % count", "neuron = part / count"),
    "wrong part": ("(part / count) * per_group_", "(part / count)"),
    "unaligned": ("inner_ % kVector<T> == 0 && together", "together"),
    "wrong group": ("(group) * outer_ * per_group_", "(group) * outer_"),
    "another parameter": ("> block ? end", ">= block ? end"),
    "missing barrier": (BARRIER, BARRIER.removeprefix("__syncthreads();")),
    "largest not kept": ("if (before > square) square = before;", ""),
}


def check_both(kernels: Library) -> None:
    assert_steps(all_cases(torch.float32), "sgd_rows_", COUNTED, DAMPENED, kernels=kernels)
    assert_steps(all_cases(torch.float32), "adam_rows_", AMSGRAD, DECOUPLED, kernels=kernels)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault):
    kernels = library(("row_steps.cuh", *FAULTS[fault]))
    with pytest.raises((AssertionError, EmulationError)):
        check_both(kernels)
