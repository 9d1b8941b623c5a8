"""Parameters with gradients and optimizer state, for row steps on a device."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from neq_kernels.channels import WHOLE_PARAMETER, NeuronLayout
from neq_kernels.optim import reference
from tests.support.arrange import arranged, random
from tests.support.gpu_cases import channels

SGD_FLAGS = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}
SGD_FLAGS |= {"nesterov": False, "maximize": False}
ADAM_FLAGS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
ADAM_FLAGS |= {"decoupled": False, "maximize": False}

ROWS, TRANSPOSED, GROUPED = NeuronLayout(), NeuronLayout(1, 1), NeuronLayout(3, 1)
PARAMETERS = [
    ((700,), ROWS, "contiguous"),  # more neurons than one program takes
    ((4, 3, 3, 3), ROWS, "contiguous"),
    ((5, 3, 2, 3), ROWS, "channels_last"),
    ((3, 528), ROWS, "contiguous"),  # in pieces of 16 bytes
    ((2, 1040), ROWS, "contiguous"),  # more of them than one tile takes
    ((2, 528), ROWS, "shifted"),
    ((2, 525), ROWS, "contiguous"),
    ((5, 12, 2, 2), TRANSPOSED, "contiguous"),
    ((5, 12, 2, 2), TRANSPOSED, "channels_last"),
    ((5, 3, 4, 4), TRANSPOSED, "contiguous"),  # in pieces, but not in one place
    ((6, 3, 3), GROUPED, "contiguous"),
    ((6, 3, 3, 2), GROUPED, "channels_last"),
    ((20, 30), WHOLE_PARAMETER, "contiguous"),
    ((), WHOLE_PARAMETER, "contiguous"),
    ((0, 4), TRANSPOSED, "contiguous"),
]
# Names of the state that is given to a step.
MOMENTUM, COUNTED = ("first", None), ("first", "steps")
ADAM, AMSGRAD = ("first", "second", None, "steps"), ("first", "second", "largest", "steps")


def placed(tensor: Tensor, kind: str, device: str) -> Tensor:
    if kind != "shifted":
        return arranged(tensor, kind).to(device)
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=device)
    return room[1:].view(tensor.shape).copy_(tensor)


class Case:
    """A parameter with gradient, state and counts, and its active neurons."""

    def __init__(self, i: int, dtype: torch.dtype, device: str, mask: str = "random") -> None:
        shape, self.layout, kind = PARAMETERS[i]
        tensors = [placed(random(shape, 10 * i + j, dtype), kind, device) for j in range(5)]
        self.param, self.grad, self.first, self.second, self.largest = tensors
        self.second.abs_()
        self.largest.abs_()
        k = self.layout.n_neurons(self.param)
        self.steps = (torch.arange(k) % 4 * (1 + 400 * i)).to(device)
        self.channels = channels(k, mask)
        self.order, self.n = self.channels.order(device), self.channels.n_active
        self.blocks = self.layout.blocks(self.param)

    def copy(self, dtype: torch.dtype | None = None) -> Case:
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                floating = value.is_floating_point()
                setattr(twin, name, value.to(dtype if floating else None, copy=True))
        return twin

    def tensors(self) -> tuple[Tensor, ...]:
        return self.param, self.grad, self.first, self.second, self.largest

    def plain_step(self, function: str, state: tuple[str | None, ...], flags: dict) -> None:
        given = (name and getattr(self, name) for name in state)
        where = self.order, self.n, self.layout
        getattr(reference, function)(self.param, self.grad, *given, *where, **flags)
