"""Norm layers that run their own forward on masked parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neq_kernels.layers.base import constructible
from neq_kernels.layers.masked import Masked, Owned
from neq_kernels.layers.norm import holds_statistics


class MaskedNorm(Masked):
    """A norm layer of any forward: one neuron per entry of its one-dimensional parameters."""

    is_norm = True

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        reason = super().reason_against(layer)
        if reason is None and any(p.dim() != 1 for p, _ in cls.parameters_in(layer)):
            return "it normalises over more than one dimension"
        return reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        is_batch_norm = isinstance(self, nn.modules.batchnorm._BatchNorm)
        if not (is_batch_norm and self.training and holds_statistics(self)):
            return super().forward(*args, **kwargs)
        self.training = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.training = True

    def channel_dim(self, output: Tensor) -> int:
        """``output_dim``, or dimension 1 or the last where the layer or the sizes say so."""
        named = {"channels_first": 1, "channels_last": -1}.get(getattr(self, "data_format", ""))
        if named is not None:
            return named % output.dim()
        assert self.output_dim is not None
        other = 1 if self.output_dim == -1 else -1
        sizes, k = output.shape, len(self.channels)
        fits = len(sizes) == 1 or sizes[self.output_dim] == k or sizes[other] != k
        return (self.output_dim if fits else other) % output.dim()


class RecognisedNorm(MaskedNorm):
    """A norm layer that is known by its name and its parameters alone; its output is checked."""

    owned = (Owned("weight"), Owned("bias"))

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        names = {name for name, _ in layer.named_parameters()}
        if not names <= {"weight", "bias"}:
            return (
                f"its name says norm, but it has the parameters {sorted(names)}; see neq.register"
            )
        return super().reason_against(layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if tensors and tensors[0].shape[-1] != len(self.channels):
            kind = type(self).__name__
            raise ValueError(
                f"{kind}: convert took it for a norm layer, by its name; expected an output whose "
                f"last dimension is that of its weight, {len(self.channels)}, got "
                f"{tuple(tensors[0].shape)}; leave it out: neq.convert(model, filter=lambda name, "
                f"module: type(module).__name__ != {kind!r})"
            )
        return output


class _ChannelNorm(MaskedNorm):
    output_dim = 1


@constructible
class SyncBatchNorm(_ChannelNorm, nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` with neurons that can be frozen: one per channel."""


class _InstanceNorm(_ChannelNorm, nn.modules.instancenorm._InstanceNorm):
    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - self._get_no_batch_dim()  # type: ignore[no-untyped-call, no-any-return]


@constructible
class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` (affine) with neurons that can be frozen: one per channel."""


@constructible
class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` (affine) with neurons that can be frozen: one per channel."""


@constructible
class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` (affine) with neurons that can be frozen: one per channel."""
