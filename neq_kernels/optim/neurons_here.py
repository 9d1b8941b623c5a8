"""Where the neurons of a parameter lie in this process, and which of them are frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.sharding import is_distributed, part_of, positions


@dataclass(frozen=True)
class RowsHere:
    """Neurons of which every one that lies here lies here by ``layout``.

    Attributes:
        layout: where a neuron lies in the local tensor.
        order: int64 on the parameter's device: the active ones, then the frozen ones, numbered as
            they lie here.
        n: how many of them are active.
        numbers: int64, on the CPU: which neurons of the layer these are; None: all, in order.
    """

    layout: NeuronLayout
    order: Tensor
    n: int
    numbers: Tensor | None

    @property
    def frozen(self) -> Tensor:
        return self.order[self.n :]


def cut_between_neurons(parameter: Tensor, layout: NeuronLayout) -> bool:
    """Whether the part of ``parameter`` in this process has a layout of its own."""
    return layout.groups == 1 or not is_distributed(parameter)


def rows_here(parameter: Tensor, layout: NeuronLayout, channels: ActiveChannels) -> RowsHere:
    """For a parameter that :func:`cut_between_neurons` accepts."""
    device = parameter.device
    if not is_distributed(parameter):
        return RowsHere(layout, channels.order(device), channels.n_active, None)
    numbers = torch.zeros(1, dtype=torch.int64, device="cpu")
    if layout.axis is not None:
        numbers = positions(parameter, layout.axis)
    mask = channels.mask_on()[numbers]
    order = torch.cat([mask.nonzero().flatten(), (~mask).nonzero().flatten()])
    return RowsHere(layout, order.to(device), int(mask.sum()), numbers)


@dataclass(frozen=True)
class FrozenRows:
    """Frozen neurons, read and written as rows of local tensors."""

    layout: NeuronLayout
    neurons: Tensor

    def read(self, tensor: Tensor) -> Tensor:
        return self.layout.gather(tensor, self.neurons)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        self.layout.scatter_(tensor, self.neurons, values)

    def clear(self, tensor: Tensor) -> None:
        self.layout.fill_(tensor, self.neurons, 0)


@dataclass(frozen=True)
class FrozenElements:
    """Frozen elements, where they are no rows: bool of the local tensors' shape."""

    mask: Tensor

    def read(self, tensor: Tensor) -> Tensor:
        return tensor[self.mask]

    def write(self, tensor: Tensor, values: Tensor) -> None:
        tensor[self.mask] = values

    def clear(self, tensor: Tensor) -> None:
        tensor[self.mask] = 0


def frozen_elements(
    parameter: Tensor, owners: list[tuple[ActiveChannels, NeuronLayout]]
) -> FrozenElements:
    """Those that no owner's active neuron contains."""
    active = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for channels, layout in owners:
        active |= layout.spread(channels.mask_on(active.device), active)
    frozen = ~active
    return FrozenElements(part_of(parameter, frozen) if is_distributed(parameter) else frozen)
