"""Memory hands out whole lines: where channels lie innermost, an active one brings its neighbours
along."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LINE_BYTES = 64
SECTOR_BYTES = 32  # of a GPU, which reads parts of its lines


@dataclass(frozen=True)
class ChannelLines:
    """A tensor whose channels lie innermost, pixel after pixel (linear layers, channels_last), from
    the beginning of a line. ``line`` is how many channels a line holds."""

    pixels: int
    channels: int
    line: int

    @classmethod
    def of(cls, tensor: Tensor, dim: int) -> ChannelLines | None:
        """Those of a tensor with its channels in ``dim``; None where they do not lie innermost."""
        channels = tensor.shape[dim]
        if tensor.numel() == 0 or not tensor.detach().movedim(dim, -1).is_contiguous():
            return None
        line = cls.line_bytes(tensor.device.type) // tensor.itemsize
        return cls(tensor.numel() // channels, channels, line)

    @staticmethod
    def line_bytes(device_type: str) -> int:
        """The least that memory of a kind of device hands out."""
        return SECTOR_BYTES if device_type == "cuda" else LINE_BYTES

    def touched(self, mask: Tensor) -> float:
        """Of the tensor's bytes, the share in lines that hold an active channel.

        Args:
            mask: bool[channels] on the CPU, True where active.
        """
        active = mask.nonzero().flatten()
        period = self.line // math.gcd(self.line, self.channels)  # pixels that fill whole lines
        periods, rest = divmod(self.pixels, period)
        lines = periods * self._lines(active, period) + self._lines(active, rest)
        return min(1.0, lines * self.line / (self.pixels * self.channels))

    def _lines(self, active: Tensor, pixels: int) -> int:
        starts = self.channels * torch.arange(pixels).unsqueeze(1)
        return len((starts + active).div(self.line, rounding_mode="floor").unique())
