"""Depthwise weight gradients, thread by thread, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels
from tests.cuda_on_cpu.emulator import MODES, EmulationError, Launch, Library, Mode, Run, build
from tests.support.cuda_cases import DTYPES, FOLDER, SMALLEST, pointer, poisoned
from tests.support.gpu_cases import MASKS, assert_gradient, channels
from tests.support.wgrad_operands import LAYOUTS, conv_operands, geometry


class Cut(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int32), ("parts", ctypes.c_int32)]


def library(*replace: tuple[str, str, str]) -> Library:
    return build([FOLDER / "depthwise" / "depthwise_wgrad.cu"], replace=replace)


@dataclass
class How:
    """Where a launch differs from the rule."""

    most: int | None = None
    rows: int | None = None
    parts: int | None = None
    blocks: int = 8
    bias: bool = True
    mode: Mode = MODES[0]
    kernels: Library | None = None


def numbers(dy: Tensor, x: Tensor, kernel: tuple[int, int], g: ConvGeometry) -> Tensor:
    sizes = [*x.shape[2:], *dy.shape[2:], *kernel, *g.stride, *g.padding, *g.dilation]
    return torch.tensor(sizes, dtype=torch.int32)


def cut(dy: Tensor, x: Tensor, kernel, g: ConvGeometry, most: int, blocks: int) -> Cut:
    function = library().functions.neq_cuda_depthwise_cut
    function.restype = Cut
    sizes = numbers(dy, x, kernel, g)
    inside = int(x.stride(1) == 1)
    return function(DTYPES[x.dtype], pointer(sizes), len(x), most, inside, blocks)


def wgrad(
    chosen: ActiveChannels, dy: Tensor, x: Tensor, kernel, g: ConvGeometry, how: How
) -> tuple[Tensor, Tensor | None, list[Launch]]:
    """Weight and bias gradients, and the launches that they took."""
    order, count, k = chosen.order(), chosen.count("cpu"), len(chosen)
    most = max(1, chosen.n_active) if how.most is None else how.most
    by_rule = cut(dy, x, kernel, g, most, how.blocks)
    rows, parts = how.rows or by_rule.rows, how.parts or by_rule.parts
    taps = kernel[0] * kernel[1]
    writes = {
        "parts": poisoned(parts, most, taps),
        "grad": poisoned(k, taps, dtype=x.dtype),
        "bias_parts": poisoned(parts, most),
        "bias": poisoned(k, dtype=x.dtype),
    }
    bias_parts, bias = (writes[name] if how.bias else None for name in ("bias_parts", "bias"))
    reads = {"dy": dy, "x": x, "order": order, "count": count}
    run = Run(how.kernels or library(), how.mode, reads, writes, SMALLEST)
    dy_strides, x_strides = torch.tensor(dy.stride()), torch.tensor(x.stride())
    sizes, dtype = numbers(dy, x, kernel, g), DTYPES[x.dtype]
    launches = run.call(
        *("neq_cuda_depthwise_wgrad", dtype, dy, pointer(dy_strides), x, pointer(x_strides)),
        *(pointer(sizes), order, count, writes["parts"], bias_parts, len(x), k),
        *(x.shape[1], rows, parts, most, None),
    )
    launches += run.call(
        *("neq_cuda_depthwise_finish", dtype, writes["parts"], bias_parts, order, count),
        *(writes["grad"], bias, k, taps, parts, most, None),
    )
    return writes["grad"].view(k, 1, *kernel), bias, launches


def check_tensors(chosen, dy, x, kernel, g, how) -> list[Launch]:
    weight = torch.zeros(len(chosen), 1, *kernel, dtype=torch.float64)
    given = (torch.where(t.isnan(), 0, t).double() for t in (dy, x))
    _, exact, exact_bias = g.backward(*given, weight, (False, True, True))
    grad, bias, launches = wgrad(chosen, dy, x, kernel, g, how)
    assert_gradient(grad, exact, chosen, dy.numel() // len(chosen))
    if bias is not None:
        assert_gradient(bias, exact_bias, chosen, dy.numel() // len(chosen))
    return launches


def check(problem, g, mask, dtype, layout, **how) -> list[Launch]:
    images, c, k, size, kernel = problem
    dy, x, _ = conv_operands(images, c, k, size, kernel, g, dtype, layout)
    return check_tensors(channels(k, mask), dy, x, kernel, g, How(**how))


def kernel_of(launches: list[Launch]) -> str:
    return launches[0].kernel.split("_kernel")[0].split("depthwise_")[1]


def expected(layout: str, dtype: torch.dtype, *numbers: int) -> str:
    """The kernel of 3 x 3 and the like, of so many channels."""
    vector = 16 // torch.empty(0, dtype=dtype).element_size()
    is_odd = any(number % vector != 0 for number in numbers)
    return "planes" if layout == "nchw" else "any" if is_odd else "rows"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_mask_and_layout(dtype, mask, layout):
    for c, k in ((24, 24), (8, 16), (7, 14)):
        g = geometry(padding=(1, 1), groups=c)
        launches = check((2, c, k, (5, 9), (3, 3)), g, mask, dtype, layout, parts=2)
        assert kernel_of(launches) == expected(layout, dtype, c, k)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_kernels_and_strides_of_their_own(side, stride, layout):
    for padding in ((side // 2,) * 2, (0, 1), (side - 1, side + 1)):
        g = geometry((stride, stride), padding, groups=8)
        for size in ((9, 20), (13, 7)):
            problem = (3, 8, 8, size, (side, side))
            launches = check(problem, g, "random", torch.float16, layout, rows=3, parts=2)
            assert kernel_of(launches) == expected(layout, torch.float16, 8)
        check(problem, g, "all", torch.float32, layout)


GEOMETRIES = {
    "unequal": ((2, 4, 12, (9, 7), (5, 2)), geometry((2, 1), (2, 1), (1, 2), 4)),
    "dilated": ((2, 9, 9, (10, 11), (3, 3)), geometry((1, 1), (2, 2), (2, 2), 9)),
    "stride of 3": ((1, 3, 6, (10, 9), (3, 3)), geometry((3, 3), (1, 1), groups=3)),
    "stride of 11": ((1, 3, 3, (14, 13), (2, 2)), geometry((11, 11), groups=3)),
    "pointwise": ((3, 40, 40, (2, 3), (1, 1)), geometry(groups=40)),
    "large": ((1, 3, 3, (11, 12), (9, 11)), geometry(padding=(4, 5), groups=3)),
    "one row": ((2, 5, 5, (1, 150), (1, 3)), geometry(padding=(0, 1), groups=5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_any_other_geometry(name, layout):
    problem, g = GEOMETRIES[name]
    launches = check(problem, g, "random", torch.float32, layout)
    assert kernel_of(launches) == "any"
    check(problem, g, "random", torch.bfloat16, layout, parts=20)


RAGGED = {
    "one pixel": (5, 8, 8, (1, 1), (3, 3)),
    "small images": (21, 8, 8, (3, 2), (3, 3)),
    "wide": (1, 8, 8, (3, 141), (3, 3)),
    "many neurons": (1, 72, 72, (4, 5), (3, 3)),
    "tall": (1, 40, 40, (20, 3), (3, 3)),
    "odd channels": (2, 33, 33, (5, 3), (3, 3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_shapes(name, layout):
    problem = RAGGED[name]
    g = geometry(padding=(1, 1), groups=problem[1])
    for parts in (1, 20):
        check(problem, g, "random", torch.float16, layout, parts=parts)
    check(problem, g, "all", torch.float32, layout, rows=2, bias=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_that_is_wider_than_the_kernel(layout):
    """Bands of it alone have no rows of X: the last one's would lie behind the tensor."""
    g = ConvGeometry((1, 1), (8, 8), (1, 1), False, (0, 0), 2)
    launches = check((1, 2, 2, (33, 31), (3, 3)), g, "all", torch.float16, layout, blocks=264)
    assert kernel_of(launches) == "any"


def test_strides_of_slices():
    """Images that lie in larger ones."""
    g = geometry(padding=(1, 1), groups=6)
    wide = torch.randn(2, 12, 10, 12).half()
    for layout in LAYOUTS:
        x = wide.contiguous(memory_format=LAYOUTS[layout])[:, 3:9, 1:9, 1:11]
        dy = wide.flip(0).contiguous(memory_format=LAYOUTS[layout])[:, 5:11, 2:10, :10]
        launches = check_tensors(channels(6, "random"), dy, x, (3, 3), g, How(parts=2))
        assert kernel_of(launches) == "any"
    launches = check_tensors(channels(6, "random"), dy, x.clone(), (3, 3), g, How(parts=2))
    assert kernel_of(launches) == "any"
    images, whole = wide[:, 2:8], wide.flip(0)[:, 1:7]
    launches = check_tensors(channels(6, "random"), images, whole, (3, 3), g, How(parts=2))
    assert kernel_of(launches) == "planes"
    g, channels_last = geometry(padding=(1, 1), groups=16), LAYOUTS["nhwc"]
    wide = torch.randn(3, 40, 10, 12).half().contiguous(memory_format=channels_last)
    for first, kernel in ((8, "rows"), (24, "rows"), (4, "any")):
        x = wide[1:, first : first + 16, 1:9, 1:11]
        dy = wide.flip(0).contiguous(memory_format=channels_last)[:2, 16:32, 2:10, :10]
        launches = check_tensors(channels(16, "random"), dy, x, (3, 3), g, How(parts=2))
        assert kernel_of(launches) == kernel


def shifted(t: Tensor, by: int) -> Tensor:
    """The same, so many elements behind a multiple of 16 bytes."""
    storage = torch.full((t.numel() + 24,), torch.nan).to(t.dtype)
    assert storage.data_ptr() % 16 == 0
    return storage.as_strided(t.shape, t.stride(), by).copy_(t)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tensors_that_start_anywhere(dtype, layout):
    """Neighbours of what is needed are read along, but nothing outside of a tensor is."""
    g = geometry(padding=(1, 1), groups=8)
    for size in ((3, 1), (1, 5), (7, 7), (11, 6)):
        for by in range(1, 4 if dtype == torch.float32 else 8):
            dy, x, _ = conv_operands(2, 8, 8, size, (3, 3), g, dtype, layout)
            chosen = channels(8, "all" if by % 2 else "random")
            dy[:, chosen.frozen] = x[:, chosen.frozen] = torch.nan
            tensors = shifted(dy, by), shifted(x, 3 * by % (16 // x.element_size()))
            launches = check_tensors(chosen, *tensors, (3, 3), g, How(parts=2))
            assert kernel_of(launches) == ("planes" if layout == "nchw" else "any")


@pytest.mark.parametrize("width", [1, 4, 7, 8, 9, 15, 16, 17, 31, 33, 70])
def test_images_beside_each_other_and_cut(width):
    for mask in ("one", "random"):
        for side, stride in ((3, 1), (3, 2), (7, 1)):
            g = geometry((stride, stride), (side // 2,) * 2, groups=24)
            problem = (5, 24, 24, (6, width), (side, side))
            launches = check(problem, g, mask, torch.float16, "nhwc", parts=3, rows=3)
            assert kernel_of(launches) == "rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_number_of_neurons(dtype):
    """Whose sectors lie across the borders of blocks."""
    g = geometry(padding=(1, 1), groups=48)
    dy, x, _ = conv_operands(2, 48, 96, (5, 9), (3, 3), g, dtype, "nhwc")
    generator = torch.Generator().manual_seed(5)
    for active in (1, 2, 5, 15, 16, 17, 20, 31, 32, 33, 40, 64, 95):
        for last in (96, active + 1):
            chosen = channels(96, "none")
            chosen.set(torch.randperm(last, generator=generator)[:active].sort().values.tolist())
            check_tensors(chosen, dy, x, (3, 3), g, How(parts=2, most=min(96, active + 20)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_active_than_provided_for(layout):
    g = geometry(padding=(1, 1), groups=40)
    for mask in ("none", "one", "random"):
        problem = (2, 40, 40, (4, 9), (3, 3))
        check(problem, g, mask, torch.float16, layout, most=40, parts=2)
        problem = (2, 40, 40, (4, 9), (1, 3))
        check(problem, g, mask, torch.float16, layout, most=40, parts=2)


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_of_frozen_channels_reaches_nothing(layout, side):
    g = geometry(padding=(1, 1), groups=24)
    dy, x, _ = conv_operands(2, 24, 24, (5, 9), (side, side), g, torch.float16, layout)
    chosen = channels(24, "random")
    dy[:, chosen.frozen] = x[:, chosen.frozen] = torch.nan
    check_tensors(chosen, dy, x, (side, side), g, How())


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_the_order_of_threads(layout, side):
    g = geometry(padding=(1, 1), groups=16)
    for dtype in (torch.float32, torch.float16):
        dy, x, _ = conv_operands(3, 16, 16, (9, 13), (side, side), g, dtype, layout)
        found = [
            wgrad(channels(16, "random"), dy, x, (side, side), g, How(parts=2, rows=4, mode=mode))
            for mode in MODES
        ]
        for grad, bias, _ in found[1:]:
            assert torch.equal(grad, found[0][0])
            assert torch.equal(bias, found[0][1])


def sectors(t: Tensor, neurons: Tensor) -> int:
    """The sectors that hold elements of these channels."""
    offsets = torch.arange(t.numel()).as_strided(t.shape, t.stride())[:, neurons]
    return len((offsets.flatten() * t.element_size() // 32).unique())


@pytest.mark.parametrize("mask", ["all", "contiguous half", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_operands_are_read_once(dtype, layout, mask):
    """Within 1.25 of the sectors of X and dY that hold needed elements, and the gradients."""
    g = geometry(padding=(1, 1), groups=64)
    dy, x, _ = conv_operands(4, 64, 64, (28, 28), (3, 3), g, dtype, layout)
    chosen = channels(64, "random")
    if mask != "random":
        chosen.set(list(range(64)) if mask == "all" else list(range(16, 48)))
    launches = check_tensors(chosen, dy, x, (3, 3), g, How(blocks=8, parts=4))
    least = 32 * (sectors(x, chosen.active) + sectors(dy, chosen.active))
    least += 64 * 10 * x.element_size()
    moved = sum(launch.total.moved_bytes for launch in launches)
    assert least <= moved <= 1.25 * least, moved / least


def test_the_cut_is_within_what_the_kernels_take():
    for layout in LAYOUTS:
        for size in (1, 7, 14, 28, 56, 112):
            for side in (3, 4, 7):
                g = geometry(padding=(side // 2, side // 2), groups=8)
                x = torch.empty(4, 8, size, size).contiguous(memory_format=LAYOUTS[layout])
                out = size + side // 2 * 2 - side + 1
                dy = torch.empty(4, 8, out, out).contiguous(memory_format=LAYOUTS[layout])
                for blocks in (1, 100, 10**6):
                    found = cut(dy, x, (side, side), g, 8, blocks)
                    assert 1 <= found.rows <= out
                    assert 1 <= found.parts <= 65535
                    assert found.parts * (8 if layout == "nchw" else 1) < 2 * blocks + 8


def check_faults(kernels: Library) -> None:
    for layout in LAYOUTS:
        for problem, g, mask in (
            ((3, 8, 16, (9, 11), (3, 3)), geometry((2, 2), (1, 1), groups=8), "random"),
            ((2, 48, 48, (5, 11), (3, 3)), geometry(padding=(1, 1), groups=48), "random"),
            ((5, 8, 8, (9, 11), (3, 3)), geometry(padding=(1, 1), groups=8), "all"),
            ((1, 8, 8, (5, 150), (3, 3)), geometry(padding=(1, 1), groups=8), "all"),
            (*GEOMETRIES["unequal"], "random"),
        ):
            check(problem, g, mask, torch.float16, layout, rows=4, parts=2, kernels=kernels)
    g = geometry(padding=(1, 1), groups=3)
    dy, x, _ = conv_operands(2, 3, 3, (5, 7), (3, 3), g, torch.float16, "nchw")
    how = How(parts=2, kernels=kernels)
    check_tensors(channels(3, "all"), shifted(dy, 3), shifted(x, 5), (3, 3), g, how)


# Of one dtype and 3 x 3, so that it is compiled fast.
FEW_KERNELS = [
    ("dtypes.cuh", f"return call({dtype}{{}});", "return cudaErrorInvalidValue;")
    for dtype in ("float", "__nv_bfloat16")
] + [
    ("depthwise_wgrad.cu", f"return call(Taps<T, {side}, {stride}>{{}});", "return otherwise();")
    for side in (5, 7)
    for stride in (1, 2)
]
BARRIER = "    __syncthreads();\n"
SUMMED = "part < f.number_of_parts; part += kDepthwiseWarps) {\n      sum"
COMPUTE = "    for (int i = thread; i < bands * threads"
NEXT_TILE = "  }\n  write_part(d, sums, first, 1,"
WAITED = "    ptx::cp_async_wait<Taps::kStages - 2>();\n"
ADDED = "for (int worker = 0; worker < workers"
IN_SECTOR = "mine / kSector == of_first / kSector"
IN_NEXT = "next >= count || mine / kSector != of_next / kSector"
BOTTOM = "smaller(d.height, top + Taps::reach(rows))"
FAULTS = {
    "finish.cuh": {
        "missing part": (SUMMED, SUMMED.replace("f.number_of_parts", "1")),
        "missing warp": (
            "int other = 1; other < kDepthwiseWarps",
            "int other = 2; other < kDepthwiseWarps",
        ),
        "frozen not zeroed": ("if (exists && i < *f.count) {", "if (exists) {"),
    },
    "common.cuh": {
        "missing worker": (ADDED, ADDED.replace("= 0", "= 1")),
        "wrong tap": ("sums[r * Taps::kSide + s] +=", "sums[s * Taps::kSide + r] +="),
        "missing tap row": (
            "i < Taps::kDepth; ++i) {\n    const int r",
            "i < 1; ++i) { const int r",
        ),
    },
    "rows.cuh": {
        "rows: no wait": (WAITED, ""),
        "rows: wait for too few": (WAITED, WAITED.replace("- 2", "- 1")),
        "rows: missing barrier": (WAITED + BARRIER, WAITED),
        "rows: sums overwrite the tile": ("  __syncthreads();\n  write_part", "  write_part"),
        "rows: of the next band": (
            "c.column < outputs ? rows : 0",
            "c.column < outputs ? d.rows : 0",
        ),
        "rows: below the image": (BOTTOM, "top + Taps::reach(rows)"),
        "rows: above the image": ("if (h < 0) begin[i]", "if (h < -1) begin[i]"),
        "rows: halo of columns": ("c.column < Taps::reach(outputs)", "c.column <= outputs"),
        "rows: left of the image": ("w >= 0 && w < d.width;", "w < d.width;"),
        "rows: of no image": ("c.unit < tile.together && unit < units", "c.unit < tile.together"),
        "rows: sector of the last block": (IN_SECTOR, "false"),
        "rows: sector of the next block": (IN_NEXT, "true"),
        "rows: wrong channel": ("(neuron / d.per_input, neurons", "(neuron, neurons"),
    },
    "planes.cuh": {
        "planes: wrong channel": (
            "d.x_strides.image + neuron / d.per_input",
            "d.x_strides.image + neuron",
        ),
        "planes: no wait": ("ptx::cp_async_wait<kPlaneStages - 1>();", ""),
        "planes: wait for too few": (
            "cp_async_wait<kPlaneStages - 1>",
            "cp_async_wait<kPlaneStages>",
        ),
        "planes: missing barrier": (BARRIER + COMPUTE, COMPUTE),
        "planes: tile overwritten": (BARRIER + NEXT_TILE, NEXT_TILE),
        "planes: rows of the next piece": (
            "step < rows && o < outputs",
            "step <= rows && o < outputs",
        ),
        "planes: column of no output": ("step < rows && o < outputs", "step < rows"),
        "planes: wrong shift": ("band.x.shift() + w", "w"),
    },
    "stretch.cuh": {
        "stretch: behind its end": ("smaller(count - begin, kVector<T>)", "kVector<T>"),
        "stretch: before the tensor": ("from - tensor + begin >= 0", "true"),
    },
    "any_kernel.cuh": {
        "any: missing tap": ("tap >= taps ||", "tap >= taps - 1 ||"),
        "any: wrong image": ("all_x + image * d.x_strides.image;", "all_x;"),
    },
}
FILES = {fault: file for file, faults in FAULTS.items() for fault in faults}


@pytest.mark.parametrize("fault", FILES)
def test_a_fault_is_caught(fault):
    file = FILES[fault]
    kernels = library(*FEW_KERNELS, (file, *FAULTS[file][fault]))
    with pytest.raises((AssertionError, EmulationError)):
        check_faults(kernels)


def test_the_kernels_without_a_fault_pass():
    check_faults(library(*FEW_KERNELS))
