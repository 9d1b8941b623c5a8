"""Optimizer steps for the active neurons of one parameter, in plain torch.

They define what a row step is, on any device, layout and memory format. ``backends.cpu`` has the
same functions in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neq_kernels.channels import NeuronLayout


class _ActiveNeurons:
    """Reads and writes neurons ``order[:n]``; with all of them active nothing is copied."""

    def __init__(self, param: Tensor, order: Tensor, n: int, layout: NeuronLayout) -> None:
        self.layout = layout
        self.neurons = None if n == layout.n_neurons(param) else order[:n]

    def read(self, tensor: Tensor) -> Tensor:
        if self.neurons is None:
            return self.layout.rows(tensor)
        return self.layout.gather(tensor, self.neurons)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        if self.neurons is not None:
            self.layout.scatter_(tensor, self.neurons, values)

    def advance(self, steps: Tensor) -> Tensor:
        """Count one step of every active neuron; their new counts."""
        if self.neurons is None:
            return steps.add_(1)
        counts = steps[self.neurons] + 1
        steps[self.neurons] = counts
        return counts

    def per_neuron(self, values: Tensor, rows: Tensor) -> Tensor:
        """One value per active neuron, shaped to broadcast over ``rows``."""
        grouped = self.neurons is None and self.layout.groups > 1
        leading = rows.shape[:2] if grouped else rows.shape[:1]
        return values.reshape(*leading, *[1] * (rows.dim() - len(leading)))


def sgd_rows_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    steps: Tensor | None,
    order: Tensor,
    n: int,
    layout: NeuronLayout,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """``torch.optim.SGD``'s update of neurons ``order[:n]``, in place; the others are not touched.

    Args:
        param, grad: the parameter and its gradient, same shape and dtype.
        momentum_buffer: of ``param``'s shape, or None when ``momentum`` is 0.
        steps: int64[K] or None. When given, the buffer of a neuron whose count is 0 starts as its
            gradient, undampened (torch's first step), and the counts of active neurons grow by 1.
        order: int64[K] on ``param``'s device, the active neurons first.
        n: the number of active neurons.
        layout: where a neuron lies in ``param``.
    """
    if n == 0:
        return
    active = _ActiveNeurons(param, order, n, layout)
    p, g = active.read(param), active.read(grad)
    if maximize:
        g = -g
    if weight_decay:
        g = g.add(p, alpha=weight_decay)
    if momentum_buffer is not None:
        buffer = active.read(momentum_buffer)
        if steps is None:
            buffer.mul_(momentum).add_(g, alpha=1 - dampening)
        else:
            is_first = active.per_neuron(active.advance(steps) == 1, p)
            going_on = (buffer * momentum).add_(g, alpha=1 - dampening)
            buffer.copy_(torch.where(is_first, g, going_on))
        active.write(momentum_buffer, buffer)
        g = g.add(buffer, alpha=momentum) if nesterov else buffer
    active.write(param, p.add_(g, alpha=-lr))


def adam_rows_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    steps: Tensor,
    order: Tensor,
    n: int,
    layout: NeuronLayout,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """``torch.optim.Adam``'s update of neurons ``order[:n]``, in place; the others are not touched.

    Args:
        param, grad: the parameter and its gradient, same shape and dtype.
        exp_avg, exp_avg_sq: first and second moment, of ``param``'s shape.
        max_exp_avg_sq: largest second moment so far (amsgrad), or None.
        steps: int64[K], one count per neuron; those of active neurons grow by 1 first, and each
            neuron's bias correction is the one of its own count.
        order: int64[K] on ``param``'s device, the active neurons first.
        n: the number of active neurons.
        layout: where a neuron lies in ``param``.
        decoupled: decay the weights directly (AdamW) instead of through the gradient.
    """
    if n == 0:
        return
    active = _ActiveNeurons(param, order, n, layout)
    p, g = active.read(param), active.read(grad)
    m, v = active.read(exp_avg), active.read(exp_avg_sq)
    # Half types: one correction per neuron, kept in float32 as torch keeps its scalar ones.
    precision = torch.promote_types(param.dtype, torch.float32)
    counts = active.advance(steps).double()
    step_size = active.per_neuron((lr / (1 - beta1**counts)).to(precision), p)
    correction = active.per_neuron((1 - beta2**counts).sqrt_().to(precision), p)

    if maximize:
        g = -g
    if weight_decay:
        if decoupled:
            p.mul_(1 - lr * weight_decay)
        else:
            g = g.add(p, alpha=weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    active.write(exp_avg, m)
    active.write(exp_avg_sq, v)
    if max_exp_avg_sq is not None:
        largest = active.read(max_exp_avg_sq)
        v = torch.maximum(largest, v, out=largest)
        active.write(max_exp_avg_sq, largest)
    denominator = (v.sqrt() / correction).add_(eps)
    active.write(param, p.sub_((m / denominator).mul_(step_size)))


def decay_frozen_(
    tensor: Tensor, order: Tensor, n: int, layout: NeuronLayout, factor: float
) -> None:
    """Multiply neurons ``order[n:]`` of ``tensor`` by ``factor``, in place."""
    if n == 0:
        tensor.mul_(factor)
    elif n < layout.n_neurons(tensor):
        frozen = order[n:]
        layout.scatter_(tensor, frozen, layout.gather(tensor, frozen).mul_(factor))
