"""Refuse reentrant checkpoints that would leave active neurons without gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction


def checkpointed(learning: Iterable[Tensor]) -> bool:
    """Whether a forward without gradients is that of a reentrant checkpoint, above layers that have
    stopped.

    Such a checkpoint runs its backward only if one of its inputs needs a gradient; PyTorch gives
    one general warning.

    Args:
        learning: parameters used in this forward.

    Raises:
        RuntimeError: it is, and they would get no gradient.
    """
    frame, outermost = sys._getframe(1), None
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            outermost = frame
        frame = frame.f_back  # type: ignore[assignment]
    if outermost is None:
        return False
    given = [t for t in outermost.f_locals["args"] if isinstance(t, Tensor)]
    if any(t.requires_grad for t in learning) and not any(t.requires_grad for t in given):
        raise RuntimeError(
            "a block with active neurons runs in checkpoint(use_reentrant=True), and would get no "
            "gradient: all below it is frozen, so no input of the checkpoint needs one. Expected "
            "checkpoint(use_reentrant=False) (transformers: gradient_checkpointing_kwargs="
            "{'use_reentrant': False}), or an input that needs a gradient (x.requires_grad_(); "
            "transformers: model.enable_input_require_grads())"
        )
    return True
