"""Recognises a call that is like one before it."""

from __future__ import annotations

from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import _is_any_autocast_enabled
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

from neq_kernels.autograd.amp import autocast_dtype_on_cpu
from neq_kernels.dispatch.selection import selector


class Likeness:
    """Recognises calls that differ from a first one in nothing but their tensors' elements.

    Args:
        operands: the tensors of the first call, on the CPU, or None for one that it lacks. Those of
            another call are compared by type, dtype, device, shape, strides and whether they
            require a gradient, together with what PyTorch's dispatcher goes by: autocast, tracing,
            transforms, modes.
    """

    __slots__ = ("_autocast", "_check", "_n", "_revision", "_threads")

    def __init__(self, *operands: Tensor | None) -> None:
        tensors = [t for t in operands if t is not None]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._check, self._n = guards.check, len(tensors)
        self._threads, self._revision = get_num_threads(), selector.revision
        self._autocast = _is_any_autocast_enabled() and autocast_dtype_on_cpu()

    def fits(self, *operands: Tensor) -> bool:
        """Whether a call with these tensors is like the first one."""
        return (
            len(operands) == self._n
            and self._check(*operands)
            and is_grad_enabled()
            and get_num_threads() == self._threads
            and selector.revision == self._revision
            and forward_ad._current_level < 0
            and not selector.rehearsal.is_running
            and (not self._autocast or autocast_dtype_on_cpu() == self._autocast)
        )
