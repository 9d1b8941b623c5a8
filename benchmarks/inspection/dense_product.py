"""A plain dense product in Triton, to compare the main loops of our kernels with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from neq_kernels.backends.triton.tiles import Tiles


@triton.jit
def product_kernel(
    dy,
    x,
    out,
    t,
    k,
    c,
    stride_dy_t,
    stride_x_t,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``out[k, c] = sum over t of dy[t, k] * x[t, c]``, one program per tile."""
    tiles_c = tl.cdiv(c, BLOCK_C)
    rn = tl.program_id(0) // tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    rc = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    rt = tl.arange(0, BLOCK_T)
    a = dy + rt[:, None] * stride_dy_t + (rn % k)[None, :]
    b = x + rt[:, None] * stride_x_t + (rc % c)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for at in range(0, t, BLOCK_T):
        inside = (at + rt < t)[:, None]
        left = tl.trans(tl.load(a, mask=inside, other=0.0))
        acc = tl.dot(left, tl.load(b, mask=inside, other=0.0), acc, input_precision=PRECISION)
        a += BLOCK_T * stride_dy_t
        b += BLOCK_T * stride_x_t
    to = out + rn[:, None] * c + rc[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(rn < k)[:, None] & (rc < c)[None, :])


@triton.jit
def described_product_kernel(
    dy,
    x,
    out,
    t,
    k,
    c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The same of descriptors."""
    tiles_c = tl.cdiv(c, BLOCK_C)
    rn = tl.program_id(0) // tiles_c * BLOCK_N
    rc = tl.program_id(0) % tiles_c * BLOCK_C
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for at in range(0, t, BLOCK_T):
        acc = tl.dot(tl.trans(dy.load([at, rn])), x.load([at, rc]), acc)
    at_n, at_c = rn + tl.arange(0, BLOCK_N), rc + tl.arange(0, BLOCK_C)
    to = out + at_n[:, None] * c + at_c[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(at_n < k)[:, None] & (at_c < c)[None, :])


def product(dy: Tensor, x: Tensor, tiles: Tiles, precision: str) -> Tensor:
    """``dy.T @ x`` of ``[T, K]`` and ``[T, C]``, rows contiguous; by descriptors where tiles are
    for ``packed`` operands."""
    (t, k), c = dy.shape, x.shape[1]
    out = torch.empty((k, c), dtype=dy.dtype, device=dy.device)
    grid = (-(-k // tiles.block_n) * -(-c // tiles.block_c),)
    blocks = {"BLOCK_N": tiles.block_n, "BLOCK_C": tiles.block_c, "BLOCK_T": tiles.block_t}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.packed:
        of_dy = TensorDescriptor.from_tensor(dy, [tiles.block_t, tiles.block_n])
        of_x = TensorDescriptor.from_tensor(x, [tiles.block_t, tiles.block_c])
        described_product_kernel[grid](of_dy, of_x, out, t, k, c, **blocks, **options)
        return out
    strides = dy.stride(0), x.stride(0)
    product_kernel[grid](dy, x, out, t, k, c, *strides, PRECISION=precision, **blocks, **options)
    return out
