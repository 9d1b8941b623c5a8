"""Every kernel of this machine against PyTorch in float64: the check that ``neq doctor`` runs."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from neq_kernels import functional, ops
from neq_kernels.backends.problem import Strategy
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.dispatch.selection import capturable, selector
from neq_kernels.doctor.cases import CASES, GPU_CASES, Case
from neq_kernels.doctor.checks import (
    DTYPES,
    FLOAT64_TOLERANCE,
    GPU_DTYPES,
    ORACLE,
    SEED,
    Check,
    coarse,
    distance,
    largest,
    leaf,
    masks,
)

# Contexts in which gradients are computed.
_Way = tuple[Callable[[], AbstractContextManager[None]], ...]
_DEFAULT: _Way = ()
_PACKED: _Way = (functools.partial(selector.forced_strategy, Strategy.PACK),)
_CUSTOM: _Way = (functools.partial(selector.forced_strategy, Strategy.CUSTOM),)
_REPLAYED: _Way = (*_CUSTOM, capturable)


def check_gradients(op: str, backend: str, device: str) -> Check:
    """Of a backend for GPUs with each strategy, because which one is the default depends on the
    size of a layer, and as a CUDA graph would replay it."""
    failures = []
    n = 0
    cases, dtypes, ways = CASES[op], DTYPES, [_DEFAULT]
    if selector.backends[backend].for_gpus:
        cases, dtypes, ways = cases + GPU_CASES[op], GPU_DTYPES, [_PACKED, _CUSTOM, _REPLAYED]
    for way in ways:
        with contextlib.ExitStack() as within:
            for enter in way:
                within.enter_context(enter())
            for case, dtype in itertools.product(cases, dtypes):
                for mask, active in masks(case.n_channels).items():
                    n += 1
                    problem = _wrong_gradient(case, dtype, active, backend, device)
                    if problem:
                        failures.append(f"{case.name}, {dtype}, active: {mask}: {problem}")
    return Check(op, backend, device, n, tuple(failures))


def _wrong_gradient(
    case: Case, dtype: torch.dtype, active: list[int], backend: str, device: str
) -> str:
    """Empty if the three gradients are right. The error allowed is twice that of PyTorch's dense
    gradient in the same dtype, and one rounding."""
    torch.manual_seed(SEED)
    channels = ActiveChannels(case.n_channels)
    channels.set(active)
    shapes = (case.input, case.weight, (case.n_channels,))
    leaves = [coarse(leaf(shape, dtype, device, case.channels_last)) for shape in shapes]
    try:
        with selector.forced_backend(backend):
            ours = _backward(case, leaves, channels, dtype)
    except Exception as error:  # whatever a broken kernel raises belongs into the report
        return f"{type(error).__name__}: {error}"
    with selector.forced_backend(ORACLE):
        exact = _backward(case, [leaf.double().cpu() for leaf in leaves], channels, dtype)
        stock = _backward(case, leaves, channels, dtype)
    for name, got, same_dtype, want in zip(
        ("input", "weight", "bias"), ours, stock, exact, strict=True
    ):
        # In float64 PyTorch is the oracle and has no error of its own to compare with.
        rounding = FLOAT64_TOLERANCE if dtype == torch.float64 else torch.finfo(dtype).eps
        allowed = 2 * distance(same_dtype, want) + rounding * largest(want)
        off = distance(got, want)
        if not off <= allowed:
            return f"{name} gradient off by {off:.2e}, allowed {allowed:.2e}"
    for name, got in (("weight", ours[1]), ("bias", ours[2])):
        layout = _layout(case) if name == "weight" else NeuronLayout()
        if layout.gather(got, channels.frozen.to(device)).count_nonzero():
            return f"{name} gradient of frozen neurons is not 0"
    return ""


def _backward(
    case: Case, leaves: Sequence[Tensor], channels: ActiveChannels, dtype: torch.dtype
) -> list[Tensor]:
    """Gradients for an output gradient whose values ``dtype`` can hold."""
    input, weight, bias = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    if case.conv is None:
        output = functional.linear(input, weight, bias, channels)
    else:
        output = functional.conv(input, weight, bias, channels, **case.conv)
    generator = torch.Generator().manual_seed(SEED)
    values = coarse(torch.randn(output.shape, generator=generator, dtype=torch.float64))
    grad = torch.empty_like(output).copy_(values)  # lies as the output does
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
    return list(grads)


def _layout(case: Case) -> NeuronLayout:
    if case.conv is not None and case.conv.get("transposed"):
        return NeuronLayout(case.conv.get("groups", 1), axis=1)
    return NeuronLayout()


def check_similarity(backend: str, device: str) -> Check:
    """Integer values, so that the sums are exact in any order."""
    failures = []
    shapes = (((4, 7), 1), ((3, 6, 5, 5), 1), ((2, 9, 8), 2))
    for (shape, dim), dtype in itertools.product(shapes, DTYPES):
        torch.manual_seed(SEED)
        a, b = (torch.randint(-3, 4, shape).to(device=device, dtype=dtype) for _ in range(2))
        exact = torch.stack(
            [
                (x.double() * y.double()).movedim(dim, 0).flatten(1).sum(1)
                for x, y in ((a, b), (a, a), (b, b))
            ]
        )
        try:
            got = ops.channel_similarity(a, b, dim)
        except Exception as error:  # as above
            failures.append(f"{shape}, {dtype}: {type(error).__name__}: {error}")
            continue
        if not torch.equal(got, exact):
            failures.append(f"{shape}, {dtype}: sums off by {distance(got, exact):.2e}")
    return Check("channel_similarity", backend, device, 3 * len(DTYPES), tuple(failures))
