"""Faults planted into the kernels' sources are caught by the comparisons of the other tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from neq_kernels.backends.triton import linear_wgrad, packed_wgrad
from neq_kernels.channels import NeuronLayout
from neq_kernels.optim import reference

# Their checks are run over the faults.
from tests.backends.triton import test_conv_wgrad, test_linear_wgrad, test_packed_wgrad
from tests.support.gpu_cases import assert_gradient, channels, poison
from tests.support.wgrad_operands import geometry, linear_operands


def linear(module: ModuleType, device: str, splits: int) -> None:
    t, k, c = 70, 20, 33
    dy, x, _, on_device = linear_operands(t, k, c, torch.float32, device)
    chosen = channels(k, "random")
    grad, bias = module.linear_wgrad(
        *on_device,
        chosen.order(device),
        chosen.count(device),
        chosen.n_active,
        True,
        splits=splits,
        tiles=test_linear_wgrad.SMALL,
    )
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)


def packed(module: ModuleType, device: str, splits: int) -> None:
    """The host takes more features for active than are, as in the replay of a graph."""
    t, k, c = 70, 20, 40
    dy, x, _, on_device = linear_operands(t, k, c, torch.float16, device)
    chosen = channels(k, "random")
    order, count = chosen.order(device), chosen.count(device)
    with mock.patch.object(packed_wgrad, "product", module.product):
        poison(device)
        grad, bias = linear_wgrad.linear_wgrad(
            *on_device, order, count, k, True, splits=splits, tiles=test_packed_wgrad.SMALL
        )
    assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
    assert_gradient(bias, dy.double().sum(0), chosen, t)


def convolution(module: ModuleType, device: str, splits: int, layout: str = "nhwc") -> None:
    g = geometry(padding=(1, 0))
    problem = (2, 5, 18, (5, 6), (3, 2))
    test_conv_wgrad.check(
        module.conv_wgrad,
        problem,
        g,
        "random",
        torch.float32,
        layout,
        device,
        splits=splits,
        tiles=test_conv_wgrad.SMALL,
    )


def depthwise(module: ModuleType, device: str) -> None:
    g = geometry(padding=(1, 1), groups=20)
    problem = (3, 20, 20, (20, 18), (3, 3))
    test_conv_wgrad.check(
        module.depthwise_wgrad, problem, g, "random", torch.float32, "nhwc", device, splits=2
    )


def gather(module: ModuleType, device: str) -> None:
    dy, chosen = torch.randn(150, 40), channels(40, "random")
    order, count, n = chosen.order(device), chosen.count(device), chosen.n_active
    packed, sums = module.gather(dy.to(device), order, count, n, transposed=True, summed=True)
    assert torch.equal(packed.cpu(), dy[:, chosen.active])
    assert_gradient(sums, dy[:, chosen.active].double().sum(0), channels(n, "all"), len(dy))


def scatter(module: ModuleType, device: str) -> None:
    chosen = channels(40, "random")
    given, out = torch.randn(chosen.n_active, 9), torch.full((40, 9), torch.nan, device=device)
    module.scatter(given.to(device), out, chosen.order(device), chosen.count(device))
    assert torch.equal(out.cpu()[chosen.active], given)
    assert not out.cpu()[chosen.frozen].any()


def optimizer(module: ModuleType, device: str, function: str) -> None:
    chosen = channels(12, "random")
    flags: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "maximize": False}
    if function == "sgd_rows_":
        n_state, flags = 1, flags | {"momentum": 0.9, "dampening": 0.5, "nesterov": True}
    else:
        n_state, flags = 2, flags | {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decoupled": True}
    exact = [torch.rand(12, 7, dtype=torch.float64) for _ in range(2 + n_state)]
    steps = torch.arange(12) % 3
    ours = [t.float().to(device) for t in exact]
    counts = steps.to(device, copy=True)
    missing: tuple[Any, ...] = () if n_state == 1 else (None,)
    order, layout = chosen.order(), NeuronLayout()
    getattr(reference, function)(*exact, *missing, steps, order, chosen.n_active, layout, **flags)
    lists: list[list[Tensor]] = [[t] for t in ours] + [[] for _ in missing]
    blocks = list(layout.blocks(ours[0]) or ())
    getattr(module, function)(
        *lists, [counts], [chosen.order(device)], [chosen.n_active], blocks, **flags
    )
    assert torch.equal(counts.cpu(), steps)
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-6)


Check = Callable[[ModuleType, str], None]
LINEAR, SPLIT_LINEAR = partial(linear, splits=1), partial(linear, splits=3)
PACKED, SPLIT_PACKED = partial(packed, splits=1), partial(packed, splits=3)
CONV, SPLIT_CONV = partial(convolution, splits=1), partial(convolution, splits=2)
NCHW = partial(convolution, splits=1, layout="nchw")
SGD = partial(optimizer, function="sgd_rows_")
ADAM = partial(optimizer, function="adam_rows_")

# (module, check, what is replaced, by what)
FAULTS: dict[str, tuple[str, Check, str, str]] = {
    "linear: missing mask": ("linear_wgrad", LINEAR, "is_row & is_active[None, :]", "is_row"),
    "linear: wrong row": (
        "linear_wgrad",
        LINEAR,
        "out + neurons[:, None] * c",
        "out + rn[:, None]*c",
    ),
    "linear: missing part": (
        "linear_wgrad",
        SPLIT_LINEAR,
        "for _ in range(splits):",
        "for _ in range(splits - 1):",
    ),
    "linear: wrong row of a sum": (
        "linear_wgrad",
        SPLIT_LINEAR,
        "out + rows[:, None] * c",
        "out + rn[:, None] * c",
    ),
    "packed: missing mask": (
        "packed_wgrad",
        PACKED,
        "tl.where(is_active[:, None], acc, 0.0)",
        "acc + 1.0",
    ),
    "packed: wrong row": ("packed_wgrad", PACKED, "out + neurons[:, None]", "out + rn[:, None]"),
    "packed: missing step of a part": (
        "packed_wgrad",
        SPLIT_PACKED,
        "range(first, last, BLOCK_T)",
        "range(first + split, last, BLOCK_T)",
    ),
    "packed: wrong columns": ("packed_wgrad", PACKED, "[at, pc * BLOCK_C]", "[at, pn * BLOCK_C]"),
    "packed: wrong feature's bias": (
        "packed_wgrad",
        SPLIT_PACKED,
        "bias_out + neurons,",
        "bias_out + rn,",
    ),
    "conv: missing mask": (
        "conv_wgrad",
        CONV,
        "is_pixel[:, None] & is_active[None, :]",
        "is_pixel[:, None]",
    ),
    "conv: missing mask, nchw": (
        "conv_wgrad",
        NCHW,
        "is_active[:, None] & is_pixel[None, :]",
        "is_pixel[None, :]",
    ),
    "conv: wrong row": ("conv_wgrad", CONV, "out + neurons[:, None]", "out + slot[:, None]"),
    "conv: missing step of a part": (
        "conv_wgrad",
        SPLIT_CONV,
        "range(first, last)",
        "range(first + split, last)",
    ),
    "conv: wrong tap": ("conv_wgrad", CONV, "tap % KERNEL_W * DILATION_W", "0 * DILATION_W"),
    "depthwise: wrong channel": (
        "depthwise_wgrad",
        depthwise,
        "features, channels = neurons *",
        "features, channels = rn *",
    ),
    "depthwise: missing step": (
        "depthwise_wgrad",
        depthwise,
        "range(first, last)",
        "range(first + 1, last)",
    ),
    "depthwise: wrong tap": (
        "depthwise_wgrad",
        depthwise,
        "tap_row * KERNEL_W + rw",
        "rw * KERNEL_H + tap_row",
    ),
    "gather: wrong channel": ("pack", gather, "+ channels[None, :]", "+ rn[None, :]"),
    "gather: missing sum": ("pack", gather, "sums.sum(0)", "sums[0]"),
    "gather: wrong sums": ("pack", gather, "tl.sum(tile", "tl.max(tile"),
    "scatter: missing mask": ("pack", scatter, "(rn < n)[:, None] &", "(rn < k)[:, None] &"),
    "scatter: wrong row": ("pack", scatter, "out + neurons[:, None]", "out + rn[:, None]"),
    "sgd: missing weight decay": ("row_steps", SGD, "grad_sign * g + weight_decay * p", "g"),
    "sgd: wrong row": ("row_steps", SGD, "tl.int64, False) + start", "tl.int64, False) + 1"),
    "sgd: first step taken for another": ("row_steps", SGD, "is_first, update,", "False, update,"),
    "adam: count one behind": ("row_steps", ADAM, "count = before + 1", "count = before + 2"),
    "adam: count not advanced": ("row_steps", ADAM, "advance(steps, order, count, ACROSS)", "pass"),
}


def with_fault(name: str, before: str, after: str, folder: Path) -> ModuleType:
    """A module of the backend, from a source in which ``before`` is replaced."""
    source = (Path(packed_wgrad.__file__).parent / f"{name}.py").read_text()
    assert before in source
    path = folder / f"{name}.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(f"faulty_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, tmp_path, device):
    name, check, before, after = FAULTS[fault]
    torch.manual_seed(0)
    check(with_fault(name, before, before, tmp_path), device)
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        check(with_fault(name, before, after, tmp_path), device)
