"""What a call depends on besides its arguments: recording, transforms, and the set of active
channels that its backward has to find unchanged."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch.selection import selector
from neq_kernels.sharding import is_distributed

PLAIN = (Tensor, Parameter)


def recorded(parameter: Tensor) -> bool:
    """Whether what runs now is recorded, by ``torch.compile`` or into a CUDA graph, to run again
    with other channels active."""
    return torch.compiler.is_compiling() or selector.rehearsal.captures(parameter)


def all_active(channels: ActiveChannels, parameter: Tensor) -> bool:
    """Whether PyTorch's own graph is right: every channel is active, and will be."""
    if recorded(parameter):
        return False
    channels.called = True
    return channels.n_active == len(channels)


def none_active(channels: ActiveChannels, parameter: Tensor) -> bool:
    """Whether nothing is to be computed: no channel is active, or will be."""
    return not recorded(parameter) and channels.n_active == 0


def check_unchanged(channels: ActiveChannels, generation: int, grad: Tensor | None = None) -> None:
    """Raise if the set of active channels is not that of ``generation``; can be a gradient hook."""
    if channels.generation != generation:
        raise RuntimeError(
            "the active channels of a layer were changed between its forward and its backward: "
            f"expected generation {generation}, got {channels.generation}; call set(), reset() "
            "and controller.step() only after backward"
        )


def transformed() -> bool:
    """Whether this eager call is part of a function transform or of forward-mode AD, which have
    rules of their own for every operator."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def unplanned() -> bool:
    """Whether this eager call is part of a trace, or :func:`transformed`."""
    return (
        _get_tracing_state() is not None
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def learns(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a parameter may need a derivative here. Not in a program that is exported or traced:
    it is for any runtime."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return False
    elif _get_tracing_state() is not None:
        return False
    elif transformed():
        return True
    needed = (weight is not None and weight.requires_grad) or (
        bias is not None and bias.requires_grad
    )
    return needed and torch.is_grad_enabled()


def left_to_pytorch(input: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own graph computes the gradients, with frozen neurons as constants: the
    call is :func:`transformed`, or no kernel of ours reads such tensors."""
    return (
        (not torch.compiler.is_compiling() and transformed())
        or input.is_nested
        or input.layout != torch.strided
        or weight.is_complex()
        or is_distributed(weight)
    )


def unobserved(weight: Tensor, grad_output: Tensor) -> bool:
    """Whether nobody watches the dispatcher, and the tensors are plain ones with data: then a
    backward needs no registered operator."""
    return (
        _len_torch_dispatch_stack() == 0
        and type(grad_output) is Tensor
        and type(weight) in PLAIN
        and not weight.is_meta
    )


def watched(output: Tensor, channels: ActiveChannels) -> Tensor:
    """``output`` of PyTorch's own graph, whose backward raises RuntimeError if ``channels`` was
    changed after the forward."""
    if output.requires_grad:
        # An in-place activation on a view leaves the view's own hooks behind, not its base's.
        base = output._base if output._is_view() else output
        assert base is not None
        base.register_hook(partial(check_unchanged, channels, channels.generation))
    return output
