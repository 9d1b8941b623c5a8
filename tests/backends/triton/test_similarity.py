"""Sums of products by channel, against float64."""

from __future__ import annotations

import pytest
import torch

from neq_kernels.backends import reference
from neq_kernels.backends.triton.similarity import channel_similarity
from tests.support.gpu_cases import DTYPES


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((300, 7), 1), ((2, 37, 5, 4), 1), ((3, 6, 9), 2), ((5,), 0), ((0, 4), 1)]
)
def test_against_the_oracle(shape, dim, dtype, splits, device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    got = channel_similarity(a.to(device), b.to(device), dim, splits=splits).cpu()
    torch.testing.assert_close(got, reference.channel_similarity(a, b, dim), rtol=1e-5, atol=1e-4)


def test_channels_last(device):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(2, 6, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    got = channel_similarity(a.to(device), b.to(device), 1).cpu()
    torch.testing.assert_close(got, reference.channel_similarity(a, b, 1), rtol=1e-5, atol=1e-4)
