"""The layers of torch.nn with neurons that can be frozen, as classes to construct.

>>> layer = neq.nn.Conv2d(64, 128, 3, padding=1)
>>> layer.channels.set([0, 5, 9])

Each is a subclass of its namesake in ``torch.nn``, takes the same arguments and exchanges state
dicts with it. ``layer.channels`` is its :class:`neq_kernels.ActiveChannels`, all active at first;
input gradients are exact.

A model built of them needs :func:`neq_kernels.convert` only for data-parallel training, or for
options: ``convert(model)`` adopts the layers. A layer without neurons that can be frozen raises
ValueError: a norm layer without a weight (InstanceNorm has none
by default), a LayerNorm or RMSNorm over more than one dimension, an empty
weight, a complex dtype.
"""

from neq_kernels.layers.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from neq_kernels.layers.embedding import Embedding
from neq_kernels.layers.linear import Linear
from neq_kernels.layers.masked import Bilinear
from neq_kernels.layers.masked_norm import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    SyncBatchNorm,
)
from neq_kernels.layers.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    LayerNorm,
    RMSNorm,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Bilinear",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "SyncBatchNorm",
]
