"""The example kernels are right, and silent, in every mode and every kind of build."""

from __future__ import annotations

import pytest

from tests.cuda_on_cpu.cases import copy_16, library, product, row_sums
from tests.cuda_on_cpu.emulator import MODES, Mode

KINDS = {"checked": {}, "fast": {"checked": False}, "portable": {"portable": True}}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_product(kind, mode):
    example = library("product.cu", **kind)
    for splits in (1, 3):
        product(example, mode, splits=splits)
        product(example, mode, by_rows=True, splits=splits)


@pytest.mark.parametrize("seed", range(3))
def test_product_in_random_order(kind, seed):
    example = library("product.cu", **kind)
    mode = Mode("random", "at issue", seed)
    product(example, mode, splits=4)
    product(example, mode, by_rows=True, splits=4)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_sums_and_copies(kind, mode):
    example = library("row_sums.cu", **kind)
    row_sums(example, mode)
    copy_16(example, mode)


def test_larger_values_in_the_fast_build():
    product(library("product.cu", checked=False), Mode(), shape=(256, 256, 2048), splits=2)


def test_launches_are_described():
    memset, kernel = product(library("product.cu"), Mode(), splits=3)
    assert memset.kernel == "cudaMemsetAsync"
    assert kernel.kernel.startswith("void example::product<__half, false, 2>(")
    assert (kernel.grid, kernel.block) == ((2, 2, 3), (128, 1, 1))
    assert kernel.shared_bytes == 2 * 2 * 32 * 72 * 2 + 4
