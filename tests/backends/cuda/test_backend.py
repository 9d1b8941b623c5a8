"""The backend's own host code: operators, allocation, who serves what."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from neq_kernels import functional as public_functional
from neq_kernels import ops as public
from neq_kernels.backends import cuda as module
from neq_kernels.backends.problem import ConvGeometry, Problem, Strategy
from neq_kernels.channels import NeuronLayout
from neq_kernels.dispatch import selection
from neq_kernels.dispatch.selection import selector
from neq_kernels.doctor import checks as doctor_checks
from neq_kernels.doctor import gradients, runner
from tests.backends.cuda.conftest import build_emulated, emulated
from tests.support.backends import aten, cuda
from tests.support.cuda_cases import DEVICE, DTYPES, images
from tests.support.gpu_cases import MASKS, assert_gradient, channels


def on_device(view):
    """The same view of a copy."""
    if view._base is None:
        return view.to(DEVICE)
    return view._base.to(DEVICE).as_strided(view.shape, view.stride(), view.storage_offset())


def linear(t, k, c, dtype, mask, offset=0):
    generator = torch.Generator().manual_seed(t + k + c)
    dy, x = (torch.randn(t, n + offset, generator=generator).to(dtype)[:, offset:] for n in (k, c))
    chosen, weight = channels(k, mask), torch.zeros(k, c, dtype=dtype, device=DEVICE)
    active = chosen.order(DEVICE), chosen.count(DEVICE), chosen.host_count
    given = on_device(dy), on_device(x)
    _, grad, bias = public.linear_backward(*given, x.shape, weight, active, [True] * 3, False)
    if chosen.n_active:
        assert_gradient(grad, dy.double().t() @ x.double(), chosen, t)
        assert_gradient(bias, dy.double().sum(0), chosen, t)


def conv(size, k, kernel, geometry, dtype, mask, layout=torch.channels_last):
    x, g = images(*size, dtype=dtype).contiguous(memory_format=layout), geometry
    shape = (k, size[1] // g.groups, *kernel)
    weight = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    out = F.conv2d(x.float(), weight.float(), None, g.stride, g.padding, g.dilation, g.groups)
    dy = images(*out.shape, dtype=dtype, seed=1).contiguous(memory_format=layout)
    chosen = channels(k, mask)
    active = chosen.order(DEVICE), chosen.count(DEVICE), chosen.host_count
    wanted, given = [False, True, True], (dy.to(DEVICE), x.to(DEVICE))
    on_card = weight.to(DEVICE)
    _, grad, bias = public.conv_backward(*given, x.shape, on_card, g, active, wanted, False)
    assert grad.stride() == weight.stride()
    tensors = (t.double() for t in (dy, x, weight))
    _, exact, exact_bias = geometry.backward(*tensors, wanted)
    if chosen.n_active:
        assert_gradient(grad, exact, chosen, dy.numel() // k)
        assert_gradient(bias, exact_bias, chosen, dy.numel() // k)


def geometry(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1):
    return ConvGeometry(stride, padding, dilation, False, (0, 0), groups)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, mask, ops):
    with selector.forced_strategy(Strategy.CUSTOM):
        for k, c in ((16, 72), (16, 1032), (48, 40), (128, 64)):
            linear(150, k, c, dtype, mask)
    assert ops.calls["linear_wgrad"] == (0 if mask in ("none", "all") else 4)


@pytest.mark.parametrize("mask", ["one", "random", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions(dtype, mask, ops):
    with selector.forced_strategy(Strategy.CUSTOM):
        conv((2, 16, 7, 9), 24, (3, 3), geometry(), dtype, mask)
        conv((2, 16, 7, 9), 72, (3, 3), geometry((2, 2)), dtype, mask)
        conv((2, 16, 7, 9), 128, (1, 1), geometry(padding=(0, 0)), dtype, mask)
        conv((3, 8, 6, 5), 16, (3, 2), geometry((1, 2), (2, 0), (2, 1)), dtype, mask)
    assert ops.calls["conv_wgrad"] == 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_convolutions(dtype, layout, ops):
    with selector.forced_strategy(Strategy.CUSTOM):
        for kernel, per_input in (((3, 3), 1), ((5, 3), 2)):
            k = 12 * per_input
            conv((2, 12, 7, 9), k, kernel, geometry(groups=12), dtype, "random", layout)
    assert ops.calls["depthwise_wgrad"] == 2


@pytest.mark.parametrize("mask", ["one", "random", "contiguous"])
def test_packing_in_front_of_the_library(mask, ops):
    with selector.forced_strategy(Strategy.PACK):
        linear(150, 64, 40, torch.float32, mask)
        conv((2, 16, 7, 9), 24, (3, 3), geometry(), torch.float32, mask)
        conv((2, 16, 7, 9), 24, (3, 3), geometry(), torch.float32, mask, torch.contiguous_format)
    # Neighbours are a view of a matrix, and NCHW planes are not ours.
    assert ops.calls["pack"] == (2 if mask == "random" else 1)
    assert ops.calls["scatter_rows"] >= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_start_at_multiples_of_16_bytes_are_copied(dtype, ops):
    with selector.forced_strategy(Strategy.CUSTOM):
        for offset in (1, 3):
            linear(70, 16, 24, dtype, "random", offset)
    assert ops.calls["linear_wgrad"] == 2


def test_what_the_kernels_cannot_serve_is_left_to_the_library(ops):
    odd = Problem((32, 9), (16, 9), None, False, torch.float32)
    nchw = Problem((2, 8, 5, 5), (16, 8, 3, 3), geometry(), False, torch.float32)
    double = Problem((32, 8), (16, 8), None, False, torch.float64)
    for problem in (odd, nchw, double):
        assert Strategy.CUSTOM not in cuda.strategies(problem)
    last = nchw._replace(channels_last=True)
    assert Strategy.CUSTOM in cuda.strategies(last)
    huge = last._replace(input_size=(2**27, 8, 5, 5))
    assert Strategy.CUSTOM not in cuda.strategies(huge)
    with selector.forced_strategy(Strategy.CUSTOM):
        linear(32, 16, 9, torch.float32, "random")
    assert ops.calls["linear_wgrad"] == 0


def test_what_is_numbered_in_more_than_31_bits_is_the_librarys():
    size = (2**12, 8, 2**10, 2**9)
    few = (2, *size[1:])
    for weight, g in (((8, 1, 3, 3), geometry(groups=8)), ((8, 8, 3, 3), geometry())):
        for x, usable in ((few, True), (size, False)):
            problem = Problem(x, weight, g, True, torch.float16)
            assert (Strategy.CUSTOM in cuda.strategies(problem)) == usable


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("t", "inputs"), [(4, 0), (0, 8), (0, 0)])
def test_a_layer_without_inputs_or_rows(t, inputs, mask, ops):
    """Its weight is empty, or no kernel has anything to read."""
    with selector.forced_strategy(Strategy.CUSTOM):
        linear(t, 16, inputs, torch.float32, mask)
    assert ops.calls["linear_wgrad"] == 0


@pytest.mark.parametrize(("inputs", "padding"), [(24, 1), (320, 1), (24, 2), (24, 3)])
def test_few_rows_of_a_convolution(inputs, padding, ops):
    """Packed where several tiles of columns would read dY; padding of 3 goes by taps."""
    conv((2, inputs, 6, 5), 16, (3, 3), geometry(padding=(padding, 2)), torch.bfloat16, "random")
    assert ops.calls["conv_wgrad"] == 1


@pytest.mark.parametrize("mask", MASKS)
def test_a_replayed_count_is_read_on_the_device(mask, ops, monkeypatch):
    """The host believes that all are active."""
    monkeypatch.setattr(selector.rehearsal, "_rehearsed", {})
    with selection.capturable():
        linear(70, 48, 24, torch.float16, mask)
        conv((2, 16, 7, 9), 48, (3, 3), geometry(), torch.float16, mask)
        conv((2, 12, 7, 9), 12, (3, 3), geometry(groups=12), torch.float16, mask)
    assert ops.calls["linear_wgrad"] == ops.calls["conv_wgrad"] == ops.calls["depthwise_wgrad"] == 1


def test_a_captured_backward_of_an_eager_forward_reads_the_count_on_the_device(ops, monkeypatch):
    """The graph may be replayed with other channels active than the plan was made for."""
    monkeypatch.setattr(selector.rehearsal, "_rehearsed", {})
    chosen = channels(48, "random")
    x, weight = (torch.randn(n, 24, device=DEVICE, requires_grad=True) for n in (70, 48))
    output = public_functional.linear(x, weight, None, chosen)
    with selection.capturable():
        output.sum().backward()
    assert ops.calls["linear_wgrad"] == 1
    assert [choice.strategy for choice in selector.rehearsal._rehearsed.values()] == [
        Strategy.CUSTOM
    ]
    assert bool(weight.grad.any(1).cpu().eq(chosen.mask).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_librarys_product(dtype, ops):
    chosen, like = channels(24, "random"), torch.zeros(24, 20, dtype=dtype, device=DEVICE)
    rows = torch.randn(chosen.n_active, 20, device=DEVICE).to(dtype)
    order, n = chosen.order(DEVICE), chosen.n_active
    out = cuda.scatter_rows(rows, like, order, n, NeuronLayout())
    assert torch.equal(out, aten.scatter_rows(rows, like, order, n, NeuronLayout()))
    assert ops.calls["scatter_rows"] == 1


def test_without_a_gpu_there_is_a_reason(monkeypatch):
    reason = module._load.__wrapped__
    if not torch.cuda.is_available():
        assert reason() in (
            "PyTorch finds no NVIDIA GPU",
            "the CUDA extension was not built when neq_kernels was installed",
        )
    monkeypatch.setattr(module, "LIBRARY", module.LIBRARY.with_name("missing.so"))
    assert reason() == "the CUDA extension was not built when neq_kernels was installed"


def test_a_driver_that_cannot_run_the_kernels_is_a_reason(emulated_library, monkeypatch):
    def refused():
        raise RuntimeError("neq_kernels multiprocessors: CUDA driver version is insufficient")

    monkeypatch.setattr(module, "_leaf", SimpleNamespace(multiprocessors=refused))
    reason = module.load_library(emulated_library or module.LIBRARY)
    assert reason is not None
    assert reason.startswith("the CUDA extension cannot be used: neq_kernels multiproc")


def test_an_error_of_a_launch_names_the_operation(ops):
    rows, order = torch.zeros(4, 8, device=DEVICE), torch.arange(8, device=DEVICE)
    count = torch.tensor([1], dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"neq_kernels pack: invalid"):
        module._leaf.pack(rows, order, count, 128 * 65536, False, False)


def test_the_self_check_runs_and_finds_every_kernel_right(ops, monkeypatch):
    """It is what lets the backend serve a GPU by itself."""
    monkeypatch.setattr(doctor_checks, "usable", lambda: iter([("cuda", DEVICE)]))
    checks = [check for check in runner.run() if check.backend == "cuda"]
    assert {check.op for check in checks} == set(doctor_checks.OPS)
    assert [failure for check in checks for failure in check.failures] == []
    assert set(ops.calls) - {"multiprocessors"} == {
        *("linear_wgrad", "conv_wgrad", "depthwise_wgrad", "pack", "scatter_rows"),
        *("sgd_rows_", "adam_rows_"),
    }


# Each in one kernel, tile or strategy alone, and the case and dtype that have to show it.
FAULTS = {
    "rows of channels_last": (
        (
            "rows.cuh",
            "= to_float(rows[dy_at + q * dy_pitch]);",
            "= 2 * to_float(rows[dy_at + q * dy_pitch]);",
        ),
        "depthwise 3x3, stride 1, channels_last, torch.float16",
    ),
    "sides and strides": (
        (
            "common.cuh",
            "sums[r * Taps::kSide + s] +=",
            "if (Taps::kSide < 7 && Taps::kStride == 1) sums[r * Taps::kSide + s] +=",
        ),
        "depthwise 3x3, stride 2, torch.float32",
    ),
    "16 neurons": (
        (
            "few_rows_conv.cuh",
            "ptx::ldmatrix_x4_trans(dy, taps.read(tap));",
            "ptx::ldmatrix_x4_trans(dy, taps.read(0));",
        ),
        "conv 3x3, 64 channels, 16 features, torch.bfloat16, active: all",
    ),
    "16 neurons of float32": (
        ("few_rows_conv.cuh", "second = Tile::kNeurons > 8 ? dy[8] : 0.0f;", "second = 0.0f;"),
        "conv 3x3, 64 channels, 16 features, torch.float32, active: all",
    ),
    "warps of few rows": (
        (
            "few_rows_conv.cuh",
            "if (column >= f.c) continue;",
            "if (column >= f.c || column >= 64) continue;",
        ),
        "conv 3x3, 128 channels, 16 features, torch.float32, active: one",
    ),
    "a stride": (
        ("wgrad.cuh", "p_ * rows.stride_h + tap.h", "p_ + tap.h"),
        "conv 3x3, strided, torch.float16",
    ),
}


def test_the_self_check_finds_what_is_wrong_in_one_kernel(monkeypatch):
    """All at once: none of the cases named is for another's fault."""
    registered = [
        ("bindings.cpp", f"LIBRARY{name}", f"LIBRARY{name}".replace("s_cuda", "s_faulty"))
        for name in (
            "(neq_kernels_cuda,",
            "_IMPL(neq_kernels_cuda, NEQ_CUDA_KEY,",
            "_IMPL(neq_kernels_cuda, CompositeExplicitAutograd,",
        )
    ]
    library = build_emulated([*registered, *(fault for fault, _ in FAULTS.values())])
    monkeypatch.setattr(module, "_leaf", torch.ops.neq_kernels_faulty)
    with emulated(library):
        failures = gradients.check_gradients("conv_backward", "cuda", "cpu").failures
    for _, case in FAULTS.values():
        assert any(case in failure for failure in failures), case
    right = (
        "conv, depthwise 5x5, stride 1, torch",
        "conv 1x1, 16 features, ",
        "conv 3x3, wide dil",
    )
    assert not [failure for failure in failures if failure.startswith(right)]
