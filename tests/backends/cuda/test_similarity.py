"""Sums of products by channel, thread by thread, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neq_kernels.backends import reference
from tests.cuda_on_cpu.emulator import MODES, EmulationError, Launch, Library, Mode, Run, build
from tests.support.cuda_cases import DTYPES, FOLDER


def library(*replace: tuple[str, str, str]) -> Library:
    return build([FOLDER / "similarity.cu"], replace=replace)


def similarity(
    a: Tensor,
    b: Tensor,
    *,
    parts: int | None = None,
    mode: Mode = MODES[0],
    kernels: Library | None = None,
) -> tuple[Tensor, Launch]:
    """float64 ``[3, K]`` of two tensors ``[outer, K, inner]``, and the launch that it took."""
    outer, k, inner = a.shape
    dtype = DTYPES[a.dtype]
    if parts is None:
        parts = library().functions.neq_cuda_similarity_parts(dtype, outer, k, inner, 16)
    out = torch.full((parts, 3, k), torch.nan, dtype=torch.float64)
    run = Run(kernels or library(), mode, {"a": a, "b": b}, {"out": out})
    sizes = (outer, k, inner, a.stride(0))
    (launch,) = run.call("neq_cuda_similarity", dtype, a, b, out, *sizes, parts, None)
    return out.sum(0), launch


def random(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    a = torch.randn(shape, generator=generator).to(dtype)
    return a, torch.randn(shape, generator=generator).to(dtype)


def check(a: Tensor, b: Tensor, **how) -> Launch:
    got, launch = similarity(a, b, **how)
    exact = reference.channel_similarity(a, b, 1)
    sizes = torch.stack([(exact[1] * exact[2]).sqrt(), exact[1], exact[2]])
    assert bool(((got - exact).abs() <= 2e-7 * sizes).all())
    return launch


SHAPES = {
    "rows": (300, 32, 1),
    "many rows": (2100, 8, 1),
    "odd channels": (300, 7, 1),
    "many channels": (20, 300, 1),
    "ragged vectors": (33, 328, 1),
    "one number": (1, 1, 1),
    "no rows": (0, 4, 1),
    "images": (3, 24, 64),
    "small images": (5, 200, 3),
    "odd images": (4, 37, 49),
    "large images": (2, 2, 4113),
    "no images": (0, 4, 9),
}


@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(dtype, name, parts):
    check(*random(*SHAPES[name], dtype=dtype), parts=parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_slices_and_misaligned_tensors(dtype):
    for shape in ((40, 33, 1), (40, 40, 1), (4, 33, 25)):
        a, b = random(*shape, dtype=dtype)
        check(a[:, 1:], b[:, 1:], parts=2)
        check(a[:, :-1], b[:, 1:], parts=2)
        check(a[:, 8:], b[:, 8:], parts=2)


@pytest.mark.parametrize("name", ["rows", "odd channels", "odd images", "large images"])
def test_bits_do_not_depend_on_the_order_of_threads(name):
    for dtype in (torch.float32, torch.float16):
        a, b = random(*SHAPES[name], dtype=dtype)
        first, *others = [similarity(a, b, parts=2, mode=mode)[0] for mode in MODES]
        for other in others:
            assert torch.equal(first, other)


def test_long_sums_of_equal_numbers():
    """Added one by one in float they would lose more digits."""
    for shape in ((40_000, 4, 1), (1, 1, 160_000)):
        a = torch.full(shape, 1.1)
        got, _ = similarity(a, a.clone(), parts=1)
        exact = a.double().square().sum((0, 2)).expand(3, -1)
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)


def test_nan_stays_in_its_channel():
    for shape in ((50, 24, 1), (50, 23, 1), (3, 24, 25)):
        a, b = random(*shape, dtype=torch.float16)
        a[:, 5] = torch.nan
        got, _ = similarity(a, b)
        assert got[:2, 5].isnan().all()
        assert got.isnan().sum() == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1568, 64, 1), (4096, 256, 1), (4, 64, 784), (8, 128, 196), (16, 256, 49)], ids=str
)
def test_operands_are_read_once(shape, dtype):
    """Within 1.05 of both tensors and the sums."""
    a, b = random(*shape, dtype=dtype)
    launch = check(a, b, parts=4)
    least = 2 * a.numel() * a.element_size() + 3 * shape[1] * 8
    assert least <= launch.total.moved_bytes <= 1.05 * least, launch.total.moved_bytes / least


def test_the_parts_are_as_many_as_are_worth_it():
    function = library().functions.neq_cuda_similarity_parts
    for shape in (*SHAPES.values(), (10**6, 64, 1), (64, 512, 49), (32, 3, 10**5)):
        for blocks in (1, 500):
            assert 1 <= function(0, *shape, blocks) <= blocks
    assert function(1, 10**6, 64, 1, 500) == 500
    assert function(1, 1000, 64, 1, 500) == 1


def check_faults(kernels: Library) -> None:
    for name in ("rows", "many rows", "ragged vectors", "odd images", "large images"):
        for parts in (1, 2):
            check(*random(*SHAPES[name], dtype=torch.float16), parts=parts, kernels=kernels)


# Of one dtype, so that it is compiled fast.
ONE_DTYPE = [
    ("dtypes.cuh", f"return call({dtype}{{}});", "return cudaErrorInvalidValue;")
    for dtype in ("float", "__nv_bfloat16")
]
READY = "ptx::cp_async_wait<kSimilarityStages - 1>();\n    __syncthreads();"
OVERWRITTEN = "    __syncthreads();\n  }\n\n  auto* const sums"
FAULTS = {
    "wrong product": ("ab += a * b", "ab += a * a"),
    "missing run": ("j < kWidth; ++j) totals[j].add", "j < 1; ++j) totals[j].add"),
    "missing rows": ("row += kRowsTogether * lanes", "row += (kRowsTogether + 1) * lanes"),
    "behind the last row": ("if (row + j * lanes < end)", "if (row < end)"),
    "behind the last channel": ("if (channel < s.k)", "if (first_channel < s.k)"),
    "missing lane": ("lane < lanes; ++lane) sum", "lane < lanes - 1; ++lane) sum"),
    "missing part": ("smaller(first + s.per_part, s.outer)", "smaller(s.per_part, s.outer)"),
    "wrong stage": ("(step - first) % kSimilarityStages * 2", "(step - first) * 0"),
    "no wait": ("cp_async_wait<kSimilarityStages - 1>", "cp_async_wait<kSimilarityStages>"),
    "missing barrier": (READY, READY.removesuffix("\n    __syncthreads();")),
    "stage overwritten": (OVERWRITTEN, OVERWRITTEN.removeprefix("    __syncthreads();\n")),
    "border of a stretch": ("smaller(count - begin, kVector<T>)", "kVector<T>"),
    "wrong shift": ("from.b.shift() + channel * count", "channel * count"),
    "wrong piece": ("step % s.pieces * kPiece<T>", "0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault):
    file = "stretch.cuh" if fault == "border of a stretch" else "similarity.cuh"
    kernels = library(*ONE_DTYPE, (file, *FAULTS[fault]))
    with pytest.raises((AssertionError, EmulationError)):
        check_faults(kernels)


def test_the_kernels_without_a_fault_pass():
    check_faults(library(*ONE_DTYPE))
