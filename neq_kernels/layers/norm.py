"""Norm layers with neurons that can be frozen."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from neq_kernels import functional
from neq_kernels.autograd import eager
from neq_kernels.autograd.call_state import all_active, learns, transformed, watched
from neq_kernels.layers.base import NeuronLayer, constructible


class _Norm(NeuronLayer):
    is_norm = True

    def channel_dim(self, output: Tensor) -> int:
        return 1

    def forward(self, input: Tensor) -> Tensor:
        """Run PyTorch's norm on a scale and shift whose gradients are masked."""
        if isinstance(input, Proxy):
            return self._traced(input)
        channels = self.channels
        weight, bias = self._learned()
        if not torch.compiler.is_compiling():
            plan: eager.AffinePlan | None = channels.plans.get(eager.AFFINE)
            masked = None if plan is None else plan.run(weight, bias)
            if masked is not None:
                return self._anchored(self._normalize(input, *masked))
        if not learns(weight, bias):
            return self._anchored(self._normalize(input, weight, bias))
        if all_active(channels, input) and not transformed():
            return self._anchored(watched(self._normalize(input, weight, bias), channels))
        return self._anchored(self._normalize(input, *functional.affine(weight, bias, channels)))

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class _LastDimension(_Norm):
    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - 1

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        if "weight" in layer._parameters and layer.weight is None:
            return "it has no weight (elementwise_affine=False)"
        reason = super().reason_against(layer)
        if reason is None and cast(Tensor, layer.weight).dim() != 1:
            return "it normalises over more than one dimension"
        return reason


@constructible
class LayerNorm(_LastDimension, nn.LayerNorm):
    """``torch.nn.LayerNorm`` over one dimension: one neuron per normalised feature."""

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


@constructible
class RMSNorm(_LastDimension, nn.RMSNorm):
    """``torch.nn.RMSNorm`` over one dimension: one neuron per normalised feature."""

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, weight, self.eps)


@constructible
class GroupNorm(_Norm, nn.GroupNorm):
    """``torch.nn.GroupNorm`` with neurons that can be frozen: one per channel's scale and shift."""

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


def holds_statistics(layer: NeuronLayer) -> bool:
    """Whether batch norm behaves as in evaluation, because it is wholly frozen."""
    return layer.hold_statistics and layer.channels.none_active and layer.running_mean is not None


class _BatchNorm(_Norm, nn.modules.batchnorm._BatchNorm):
    """Running statistics are updated as in torch.nn, whatever is frozen, unless they are held."""

    def _normalize(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        training = self.training and not holds_statistics(self)
        momentum = 0.0 if self.momentum is None else self.momentum
        if training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        batch_statistics = training or (self.running_mean is None and self.running_var is None)
        tracked = not training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            weight,
            bias,
            batch_statistics,
            momentum,
            self.eps,
        )


@constructible
class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with neurons that can be frozen: one per channel."""


@constructible
class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with neurons that can be frozen: one per channel."""


@constructible
class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with neurons that can be frozen: one per channel."""
