"""The launchers of ``csrc/cuda`` on CPU tensors, run by the emulator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels
from tests.cuda_on_cpu.emulator import MODES, Device, Launch, Library, Mode, Run, build

# Where the tests of the backend itself run.
DEVICE = "cuda" if os.environ.get("NEQ_CUDA_EXECUTOR") == "cuda" else "cpu"
FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
# The smallest GPU's shared memory: compute capability 7.5.
SMALLEST = Device(shared_limit=64 * 1024)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SOURCES = ("wgrad", "few_rows_conv", "pack", "finish")


def library(
    sources: Sequence[str] = SOURCES,
    *,
    replace: Sequence[tuple[str, str, str]] = (),
    checked: bool = True,
) -> Library:
    """Products, packing and the second pass."""
    return build(
        [FOLDER / "wgrad" / f"{name}.cu" for name in sources], replace=replace, checked=checked
    )


def without(*dtypes: torch.dtype) -> list[tuple[str, str, str]]:
    """What to replace so that kernels are compiled for the other dtypes only."""
    names = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
    return [
        ("dtypes.cuh", f"return call({names[d]}{{}})", "return cudaErrorInvalidValue")
        for d in dtypes
    ]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan).to(dtype)


def wgrad(
    chosen: ActiveChannels,
    grad_output: Tensor,
    input: Tensor,
    geometry: ConvGeometry | None = None,
    kernel: tuple[int, int] = (1, 1),
    *,
    most: int | None = None,
    parts: int = 1,
    packed: bool = False,
    channels_last: bool = True,
    mode: Mode = MODES[0],
    kernels: Library | None = None,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Weight and bias gradients, and the launches that they took.

    Args:
        grad_output: ``[T, K]``, or channels_last images.
        input: ``[T, C]``, or channels_last images.
        geometry: of a convolution with this ``kernel``.
        most: active channels to provide for.
        parts: of the reduction, at most.
        packed: whether dY is packed first.
        channels_last: how a convolution's weight lies in memory.
    """
    dtype = DTYPES[input.dtype]
    order, count = chosen.order(), chosen.count("cpu")
    most = max(1, chosen.n_active) if most is None else most
    k, c, taps = len(chosen), input.shape[1], kernel[0] * kernel[1]
    dy = grad_output if geometry is None else grad_output.permute(0, 2, 3, 1).flatten(0, 2)
    assert dy.data_ptr() == grad_output.data_ptr()
    t = len(dy)
    multiple = 16 // input.element_size()
    padded = -(-most // multiple) * multiple
    names = {
        "parts": poisoned(parts, most, taps, c),
        "bias_parts": poisoned(parts, most),
        "packed": poisoned(t, padded, dtype=input.dtype),
        "grad": poisoned(k, taps * c, dtype=input.dtype),
        "bias": poisoned(k, dtype=input.dtype),
    }
    kernels = kernels or library()
    reads = {"dy": grad_output, "x": input, "order": order, "count": count}
    run = Run(kernels, mode, reads, names, SMALLEST)
    launches: list[Launch] = []
    source, stride = grad_output, k
    if packed:
        launches += run.call(
            *("neq_cuda_pack", dtype, grad_output, k, order, count, names["packed"], padded, None),
            *(2, t, most, 0, None),
        )
        source, stride = names["packed"], padded
    per_part = -(-max(1, -(-t // parts)) // 32) * 32
    about = (order, count, names["parts"], names["bias_parts"], t, per_part, c, most, int(packed))
    if geometry is None:
        launches += run.call(
            "neq_cuda_linear_wgrad", dtype, source, stride, input, input.stride(0), *about, None
        )
    else:
        x_strides = torch.tensor([input.stride(i) for i in (0, 2, 3)])
        g = geometry
        numbers = torch.tensor(
            [
                *(*input.shape[2:], *grad_output.shape[2:], *kernel),
                *(*g.stride, *g.padding, *g.dilation),
            ],
            dtype=torch.int32,
        )
        launches += run.call(
            *("neq_cuda_conv_wgrad", dtype, source, stride, input),
            *(pointer(x_strides), pointer(numbers), *about, None),
        )
    strides = (1, c) if channels_last else (taps, 1)
    launches += run.call(
        *("neq_cuda_finish", 0, dtype, names["parts"], names["bias_parts"], order, count),
        *(names["grad"], names["bias"], k, c, *strides),
        *(-(-t // per_part), -(-t // per_part), most, taps, None),
    )
    grad = names["grad"]
    if geometry is not None:
        inside = grad.view(k, *kernel, c).permute(0, 3, 1, 2)
        grad = inside if channels_last else grad.view(k, c, *kernel)
    return grad, names["bias"], launches


def pointer(host: Tensor):
    """Of memory that only the launcher reads."""
    return ctypes.c_void_p(host.data_ptr())


def images(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator).to(dtype)
    return made.contiguous(memory_format=torch.channels_last)
