"""Operands of weight gradients, the same for the same sizes."""

from __future__ import annotations

import torch

from neq_kernels.backends.problem import ConvGeometry

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def geometry(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    return ConvGeometry(stride, padding, dilation, False, (0, 0), groups)


def conv_operands(images, c, k, size, kernel, g, dtype, layout):
    generator = torch.Generator().manual_seed(images + c + k)
    x = torch.randn(images, c, *size, generator=generator).to(dtype)
    weight = torch.zeros(k, c // g.groups, *kernel, dtype=dtype)
    out = [
        (i + 2 * p - d * (r - 1) - 1) // s + 1
        for i, p, d, r, s in zip(size, g.padding, g.dilation, kernel, g.stride, strict=True)
    ]
    dy = torch.randn(images, k, *out, generator=generator).to(dtype)
    return [tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in (dy, x, weight)]


def linear_operands(t, k, c, dtype, device):
    generator = torch.Generator().manual_seed(t + k + c)
    dy = torch.randn(t, k, generator=generator).to(dtype)
    x = torch.randn(t, c, generator=generator).to(dtype)
    weight = torch.zeros(k, c, dtype=dtype)
    return dy, x, weight, (dy.to(device), x.to(device), weight.to(device))
