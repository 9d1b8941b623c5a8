"""The 16-bit formats are those of torch, to the bit."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.cases import library

FORMATS = {"half": torch.float16, "bfloat16": torch.bfloat16}
EVERY_16_BITS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)


@pytest.fixture(params=[False, True], ids=["native", "portable"])
def functions(request):
    return library("probes.cu", portable=request.param).functions


def converted(function, given: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(given.shape, dtype=dtype)
    function(
        ctypes.c_void_p(given.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(given.numel()),
    )
    return out


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    same = (actual.view(bits) == expected.view(bits)) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), (actual[~same][:5], expected[~same][:5])


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_to_float_and_back(functions, name):
    values = EVERY_16_BITS.view(FORMATS[name])
    as_float = converted(getattr(functions, f"{name}_to_float"), values, torch.float32)
    assert_same_bits(as_float, values.float())
    back = converted(getattr(functions, f"float_to_{name}"), as_float, FORMATS[name])
    assert_same_bits(back, values)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding(functions, name):
    dtype = FORMATS[name]
    values = EVERY_16_BITS.view(dtype).float().sort().values
    values = values[values.isfinite()]
    # Halfway between neighbours, and one float to either side; then floats of every magnitude.
    halfway = ((values[1:].double() + values[:-1].double()) / 2).float()
    beside = [torch.nextafter(halfway, torch.tensor(limit)) for limit in (-torch.inf, torch.inf)]
    anything = torch.randint(-(1 << 31), 1 << 31, (1_000_000,)).to(torch.int32).view(torch.float32)
    for given in (halfway, *beside, anything, values.max().mul(torch.tensor([1.0, 1.001, 1.01]))):
        actual = converted(getattr(functions, f"float_to_{name}"), given, dtype)
        assert_same_bits(actual, given.to(dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_nan_is_the_one_of_cuda(functions, name):
    nan = torch.tensor([torch.nan, -torch.nan])
    actual = converted(getattr(functions, f"float_to_{name}"), nan, FORMATS[name])
    assert actual.view(torch.int16).tolist() == [0x7FFF, 0x7FFF]
