"""Peer 1 in whole models: what a careful user would write to skip the wgrad of frozen channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benchmarks.kernels.peers import index_select, why_not_compacted
from neq_kernels.backends.problem import ConvGeometry

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)


def convert(model: nn.Module) -> nn.Module:
    """Give every convolution and linear layer of an exact torch.nn type a backward by
    :func:`benchmarks.kernels.peers.index_select`. In place; all channels stay active until
    :func:`set_active`. Returns ``model``.

    Optimizers know nothing of it: give it torch's own, which moves frozen rows of a layer that is
    still in use by momentum and weight decay.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PeerLinear
        elif type(module) in _CONVS and _supported(module):
            module.__class__ = _CONVS[type(module)]
    return model


def set_active(model: nn.Module, masks: Mapping[str, Tensor], others: bool = True) -> None:
    """Choose the active channels.

    A layer without an active channel gets ``requires_grad_(False)``; a norm layer that is partly
    frozen gets a gradient hook; any other layer that peer 1 does not support raises.

    Args:
        model: a model of :func:`convert`.
        masks: layer name to int64 indices, ascending. Layers not named are left as they are.
        others: whether the parameters of no named layer learn.

    Raises:
        ValueError: no layer of that name, or a layer that cannot be partly frozen.
    """
    modules = dict(model.named_modules())
    if unknown := sorted(masks.keys() - modules.keys()):
        raise ValueError(f"masks: expected layer names, got {unknown}")
    owned = {id(p) for name in masks for p in modules[name].parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in owned:
            parameter.requires_grad_(others)
    for name, active in masks.items():
        layer = modules[name]
        k = len(layer.weight)
        partly = 0 < len(active) < k
        layer.requires_grad_(len(active) > 0)
        active = active.to(layer.weight.device)
        if isinstance(layer, (PeerLinear, _PeerConv)):
            layer.active = active if partly else None
        elif isinstance(layer, NORMS):
            _hook_norm(layer, _complement(active, k) if partly else None)
        elif partly:
            raise ValueError(f"{name}: {type(layer).__name__} cannot be partly frozen by peer 1")


class PeerLinear(nn.Linear):
    active: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.active is None:
            return super().forward(input)
        out: Tensor = _LinearFunction.apply(*_cast(input, self.weight, self.bias), self.active)
        return out


class _PeerConv(nn.modules.conv._ConvNd):
    active: Tensor | None = None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.active is None:
            return super()._conv_forward(input, weight, bias)
        operands = _cast(input, weight, bias)
        out: Tensor = _ConvFunction.apply(*operands, self.active, _geometry(self))
        return out


class PeerConv1d(_PeerConv, nn.Conv1d):
    pass


class PeerConv2d(_PeerConv, nn.Conv2d):
    pass


class PeerConv3d(_PeerConv, nn.Conv3d):
    pass


_CONVS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: PeerConv1d,
    nn.Conv2d: PeerConv2d,
    nn.Conv3d: PeerConv3d,
}


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, active)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, active = ctx.saved_tensors
        dx = dy.matmul(weight) if ctx.needs_input_grad[0] else None
        return dx, *index_select(None, dy, x, weight, active, ctx.has_bias), None


class _ConvFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        active: Tensor,
        geometry: ConvGeometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, active)
        ctx.has_bias, ctx.geometry = bias is not None, geometry
        g = geometry
        return torch.convolution(
            x, weight, bias, g.stride, g.padding, g.dilation, False, g.output_padding, g.groups
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, active = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.geometry.backward(dy, x, weight, (True, False, False))[0]
        return dx, *index_select(ctx.geometry, dy, x, weight, active, ctx.has_bias), None, None


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As autocast does, but before what is saved for backward."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _geometry(layer: Any) -> ConvGeometry:
    return ConvGeometry(
        layer.stride, layer.padding, layer.dilation, False, layer.output_padding, layer.groups
    )


def _supported(layer: Any) -> bool:
    plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return plain and why_not_compacted(_geometry(layer), layer.weight) is None


def _complement(active: Tensor, k: int) -> Tensor:
    frozen = torch.ones(k, dtype=torch.bool, device=active.device)
    return frozen.index_fill_(0, active, False).nonzero().flatten()


def _hook_norm(layer: nn.Module, frozen: Tensor | None) -> None:
    for handle in layer.__dict__.pop("peer_hooks", ()):
        handle.remove()
    if frozen is None:
        return
    zero: Callable[[Tensor], Tensor] = lambda grad: grad.index_fill(0, frozen, 0)  # noqa: E731
    layer.__dict__["peer_hooks"] = [p.register_hook(zero) for p in layer.parameters()]
