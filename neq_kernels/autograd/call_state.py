"""What an eager call depends on besides its arguments: recording, transforms, and the set of
active channels that its backward has to find unchanged."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state

from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch import cuda_graphs


def recorded(parameter: Tensor) -> bool:
    """Whether what runs now is recorded, by ``torch.compile`` or into a CUDA graph, to run again
    with other channels active."""
    return torch.compiler.is_compiling() or cuda_graphs.captured(parameter)


def all_active(channels: ActiveChannels, parameter: Tensor) -> bool:
    """Whether PyTorch's own graph serves: every channel is active, and will be."""
    return not recorded(parameter) and channels.n_active == len(channels)


def stopped(channels: ActiveChannels, parameter: Tensor) -> bool:
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
    """Whether this eager call is part of a trace or of a function transform."""
    return _get_tracing_state() is not None or _are_functorch_transforms_active()


def watched(output: Tensor, channels: ActiveChannels) -> Tensor:
    """``output`` of PyTorch's own graph, whose backward raises RuntimeError if ``channels`` was
    changed after the forward."""
    if output.requires_grad:
        # An in-place activation on a view leaves the view's own hooks behind, not its base's.
        base = output._base if output._is_view() else output
        assert base is not None
        base.register_hook(partial(check_unchanged, channels, channels.generation))
    return output
