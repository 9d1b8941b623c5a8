"""timm: its own convolutions, linear layer and norms."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.fx import Proxy

from neq_kernels.conversion.recipe import Recipe
from neq_kernels.layers import conv, linear
from neq_kernels.layers.masked import WEIGHT_AND_BIAS, Masked, Owned
from neq_kernels.layers.masked_norm import MaskedNorm

_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)
# Norms of their own kind, by the start of their names: the parameters that hold channels.
_NORMS = {
    "RmsNorm": WEIGHT_AND_BIAS,
    "SimpleNorm": WEIGHT_AND_BIAS,
    "EvoNorm2d": (*WEIGHT_AND_BIAS, Owned("v")),
    "FilterResponseNorm": (*WEIGHT_AND_BIAS, Owned("tau")),
}
_CHANNELS_FIRST = ("2d", "EvoNorm", "FilterResponse")


class SameConv2d(conv._Conv):
    """A convolution that pads as TensorFlow does, by the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        from timm.layers.padding import pad_same

        if isinstance(x, Proxy):
            return self._traced(x)
        weight, bias = self._learned()
        padded = cast(Tensor, pad_same(x, weight.shape[-2:], self.stride, self.dilation))
        return self._convolve(padded, weight, bias, (0, 0))


def recipe(kind: type[nn.Module]) -> Recipe | None:
    name = kind.__name__
    if kind.__module__ == "timm.layers.linear" and name == "Linear":
        return Recipe(linear.Linear)  # casts only when it is scripted
    if name == "Conv2dSame":
        return Recipe(SameConv2d)
    if issubclass(kind, _PRODUCTS) and "forward" in vars(kind):
        # Weight standardisation: a gain per channel besides.
        dim = -1 if issubclass(kind, nn.Linear) else 1
        return Recipe(Masked, {"owned": (*WEIGHT_AND_BIAS, Owned("gain")), "output_dim": dim})
    for start, owned in _NORMS.items():
        if name.startswith(start):
            dim = 1 if any(part in name for part in _CHANNELS_FIRST) else -1
            return Recipe(MaskedNorm, {"owned": owned, "output_dim": dim})
    return None
