"""Counted lines are those that the elements of a tensor of that format really lie in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neq_kernels.measure.cache_lines import ChannelLines


def lines_by_address(dy: Tensor, dim: int, active: list[int], line_bytes: int) -> float:
    """Share of the bytes of ``dy`` in lines with an element of an active channel."""
    elements = torch.arange(dy.numel()).as_strided(dy.shape, dy.stride())
    read = elements.index_select(dim, torch.tensor(active, dtype=torch.int64))
    lines = (read * dy.itemsize // line_bytes).unique().numel()
    return min(1.0, lines * line_bytes / dy.nbytes)


def masked(k: int, active: list[int]) -> Tensor:
    mask = torch.zeros(k, dtype=torch.bool)
    mask[active] = True
    return mask


def nhwc(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("dy", "dim", "active", "expected"),
    [
        (nhwc(2, 16, 5, 5), 1, [3], 1.0),
        (nhwc(2, 32, 5, 5), 1, [3, 4], 0.5),
        (nhwc(2, 32, 5, 5), 1, [15, 16], 1.0),
        (torch.empty(8, 1024, dtype=torch.bfloat16), -1, list(range(64, 96)), 1 / 32),
        (torch.empty(8, 1024, dtype=torch.bfloat16), -1, list(range(65, 97)), 2 / 32),
        # Two pixels of 40 channels fill five lines, of which channels 15 and 16 lie in three.
        (nhwc(2, 40, 5, 6), 1, [15, 16], 0.6),
        (torch.empty(8, 1024), -1, [], 0.0),
    ],
)
def test_hand_worked_shares(dy, dim, active, expected):
    lines = ChannelLines.of(dy, dim)
    assert lines.touched(masked(dy.shape[dim], active)) == expected
    assert lines_by_address(dy, dim, active, 64) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 8, 16, 24, 40, 63, 96, 200])
@pytest.mark.parametrize("pixels", [(1, 1, 1), (3, 1, 1), (1, 7, 1), (2, 5, 7)])
def test_as_many_as_by_address(dtype, channels, pixels):
    n, h, w = pixels
    dy = nhwc(n, channels, h, w, dtype=dtype)
    lines = ChannelLines.of(dy, 1)
    generator = torch.Generator().manual_seed(channels)
    for count in {1, max(1, channels // 10), max(1, channels // 2), channels}:
        active = torch.randperm(channels, generator=generator)[:count].tolist()
        share = lines.touched(masked(channels, active))
        assert share == pytest.approx(lines_by_address(dy, 1, active, 64))
        assert count / channels <= share <= 1


def test_where_channels_lie_apart_there_are_no_lines_to_share():
    assert ChannelLines.of(torch.empty(2, 16, 5, 5), 1) is None
    assert ChannelLines.of(torch.empty(4, 3, 16).transpose(0, 1), -1) is None  # pixels do not
    assert ChannelLines.of(torch.empty(0, 16), -1) is None
    # One pixel of planes is a row of channels.
    assert ChannelLines.of(torch.empty(4, 16, 1, 1), 1) == ChannelLines(4, 16, 16)


def test_gpus_read_sectors():
    assert ChannelLines.line_bytes("cpu") == 64
    assert ChannelLines.line_bytes("cuda") == 32
