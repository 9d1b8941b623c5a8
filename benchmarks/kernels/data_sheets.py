"""Peaks of GPUs, from NVIDIA's data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks in bytes and FLOPs per second ("A100 Tensor Core GPU", "H100 Tensor Core GPU": SXM,
    80 GB, without sparsity).

    Attributes:
        bandwidth: of the memory.
        tensor_flops: of 16-bit products in tensor cores.
        vector_flops: of float32 outside them.
    """

    bandwidth: float
    tensor_flops: float
    vector_flops: float


GPUS = {
    "A100": Gpu(2.039e12, 312e12, 19.5e12),
    "H100": Gpu(3.35e12, 989.4e12, 66.9e12),
}
