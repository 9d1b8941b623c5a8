"""torchvision's Swin attention, which reads its layers' weights without calling the layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention as _ShiftedWindowAttention,
)
from torchvision.models.swin_transformer import (
    ShiftedWindowAttentionV2,
)


class ShiftedWindowAttention(_ShiftedWindowAttention):  # type: ignore[misc]
    """Window attention that calls its ``qkv`` and ``proj`` layers, so that they can be converted.

    Input and output: ``[B, H, W, C]``, as torchvision's.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, columns = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        _, full_height, full_width, _ = padded.shape
        # A window that covers the whole image has nowhere to be shifted to.
        shift = (
            0 if rows >= full_height else self.shift_size[0],
            0 if columns >= full_width else self.shift_size[1],
        )
        shifted = any(shift)
        if shifted:
            padded = torch.roll(padded, (-shift[0], -shift[1]), (1, 2))
        grid = (full_height // rows, full_width // columns)
        windows = padded.unflatten(2, (grid[1], columns)).unflatten(1, (grid[0], rows))
        windows = windows.transpose(2, 3).reshape(-1, rows * columns, channels)

        heads, per_head = self.num_heads, channels // self.num_heads
        qkv = self.qkv(windows).unflatten(-1, (3, heads, per_head)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query * per_head**-0.5) @ key.transpose(-2, -1)
        scores = scores + self.get_relative_position_bias()
        if shifted:
            bias = _shift_bias((full_height, full_width), (rows, columns), shift, x)
            scores = (scores.unflatten(0, (batch, -1)) + bias[None, :, None]).flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        out = F.dropout(self.proj(mixed), self.dropout, self.training)

        out = out.unflatten(1, (rows, columns)).unflatten(0, (batch, *grid)).transpose(2, 3)
        out = out.reshape(batch, full_height, full_width, channels)
        if shifted:
            out = torch.roll(out, shift, (1, 2))
        return out[:, :height, :width].contiguous()


def _shift_bias(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], like: Tensor
) -> Tensor:
    """``[windows, positions, positions]``: -100 between positions that were not neighbours before
    the roll, else 0."""
    regions = []
    for extent, side, offset in zip(size, window, shift, strict=True):
        position = torch.arange(extent, device=like.device)
        regions.append((position >= extent - side).long() + (position >= extent - offset).long())
    region = regions[0][:, None] * 3 + regions[1]
    region = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2)
    region = region.reshape(-1, window[0] * window[1])
    apart = region[:, None, :] != region[:, :, None]
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    _ShiftedWindowAttention: ShiftedWindowAttention
}

# A bias is altered on the way from the layer to the product.
BYPASSING: dict[type[nn.Module], str] = {
    ShiftedWindowAttentionV2: "ShiftedWindowAttentionV2 uses its weight without calling it"
}
