"""Check the row steps of the optimizers against torch.optim."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neq_kernels.backends.base import Backend
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.dispatch.selection import selector
from neq_kernels.doctor.cases import LAYOUTS, OPTIMIZERS
from neq_kernels.doctor.checks import (
    FLOAT16_EPS,
    FLOAT64_TOLERANCE,
    GPU_DTYPES,
    SEED,
    Check,
    distance,
    largest,
    leaf,
    masks,
    usable,
)
from neq_kernels.optim.multi_tensor import Batches, RowStep


def row_step_checks() -> Iterator[Check]:
    """Row steps against torch's own optimizers, frozen rows bit for bit."""
    steppers: list[tuple[str, Backend | None, str]] = [("torch", None, "cpu")]
    for name, device in usable():
        if name == "cpu" or selector.backends[name].for_gpus:
            steppers.append((name, selector.backends[name], device))
    for (label, backend, device), name in itertools.product(steppers, ("SGD", "Adam", "AdamW")):
        failures = []
        n = 0
        is_for_gpus = backend is not None and backend.for_gpus
        dtypes = GPU_DTYPES if is_for_gpus else (torch.float64,)
        kinds = [(kind, options) for kind, options in OPTIMIZERS if kind.__name__ == name]
        for (kind, options), layout, dtype in itertools.product(kinds, LAYOUTS, dtypes):
            kind_of_layout, shape, where, channels_last = layout
            parameter = leaf(shape, dtype, device, channels_last)
            if backend is not None and not backend.supports_row_steps(parameter, where):
                continue
            if dtype == torch.float16 and name != "SGD":
                options = options | {"eps": FLOAT16_EPS}
            for mask, active in masks(where.n_neurons(parameter)).items():
                n += 1
                problem = _wrong_step(backend, kind, options, parameter, where, active)
                if problem:
                    about = f"{kind_of_layout}, {dtype}, {options}, active: {mask}"
                    failures.append(f"{about}: {problem}")
        yield Check(f"{name} row step", label, device, n, tuple(failures))


def _wrong_step(
    backend: Backend | None,
    optimizer: type[torch.optim.Optimizer],
    options: dict[str, Any],
    start: Tensor,
    layout: NeuronLayout,
    active: list[int],
) -> str:
    """Empty if three steps are right. The error allowed is as for gradients."""
    channels = ActiveChannels(layout.n_neurons(start))
    channels.set(active)
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    exact = torch.nn.Parameter(start.to(torch.float64, copy=True))
    stock, in_float64 = optimizer([theirs], **options), optimizer([exact], **options)
    step = _row_step(backend, stock, ours, channels, layout)
    torch.manual_seed(SEED)
    try:
        for _ in range(3):
            theirs.grad = torch.randn_like(theirs)
            exact.grad = theirs.grad.double()
            step(theirs.grad.clone())
            stock.step()
            in_float64.step()
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}"
    moving, held = (index.to(start.device) for index in (channels.active, channels.frozen))
    got, same_dtype, want = (
        layout.gather(tensor.detach(), moving) for tensor in (ours, theirs, exact)
    )
    is_float64 = start.dtype == torch.float64
    rounding = FLOAT64_TOLERANCE if is_float64 else torch.finfo(start.dtype).eps
    allowed = 2 * distance(same_dtype, want) + rounding * max(largest(want), 1.0)
    off = distance(got, want)
    if not off <= allowed:
        return f"active rows off by {off:.2e}, allowed {allowed:.2e}"
    if not torch.equal(layout.gather(ours, held), layout.gather(start, held)):
        return "frozen rows moved"
    return ""


def _row_step(
    backend: Backend | None,
    stock: torch.optim.Optimizer,
    parameter: Tensor,
    channels: ActiveChannels,
    layout: NeuronLayout,
) -> Callable[[Tensor], None]:
    group = stock.param_groups[0]
    device = parameter.device
    steps = torch.zeros(len(channels), dtype=torch.int64, device=device)
    shared = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
    state: tuple[Tensor | None, ...]
    if isinstance(stock, torch.optim.SGD):
        keys = ("momentum", "dampening", "nesterov")
        shared |= {name: group[name] for name in keys}
        state = torch.zeros_like(parameter) if group["momentum"] else None, steps
        function = "sgd_rows_"
    else:
        shared |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}
        shared["decoupled"] = isinstance(stock, torch.optim.AdamW)
        mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
        largest = torch.zeros_like(parameter) if group["amsgrad"] else None
        state = mean, square, largest, steps
        function = "adam_rows_"
    row_step = RowStep(parameter, state, channels.order(device), channels.n_active, layout, backend)
    batches = Batches(function, [row_step])

    def step(grad: Tensor) -> None:
        parameter.grad = grad
        batches.run(shared)

    return step
