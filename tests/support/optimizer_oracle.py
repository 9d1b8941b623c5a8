"""One torch optimizer per neuron: the definition of what attach has to equal.

Every neuron of every parameter is copied into a parameter of its own with an optimizer of its own.
A frozen neuron's optimizer is not stepped; freezing replaces it by a fresh one under "reset".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def neuron_views(tensor: Tensor, groups: int | None) -> list[Tensor]:
    """Views of the neurons; ``groups`` is None for rows, else those of a transposed conv."""
    if groups is None:
        return list(tensor)
    blocks = tensor.chunk(groups)
    return [block[:, j] for block in blocks for j in range(tensor.shape[1])]


class NeuronwiseOptimizer:
    def __init__(self, make: MakeOptimizer, frozen_state: str) -> None:
        self.make, self.frozen_state = make, frozen_state
        self.parameters: dict[str, tuple[int | None, Tensor]] = {}
        self.optimizers: dict[tuple[str, int], torch.optim.Optimizer] = {}
        self.was_active: dict[tuple[str, int], bool] = {}

    def add(self, name: str, value: Tensor, groups: int | None = None) -> None:
        self.parameters[name] = (groups, value.detach().clone())
        for k, row in enumerate(neuron_views(self.parameters[name][1], groups)):
            self.optimizers[name, k] = self.make([nn.Parameter(row.contiguous().clone())])
            self.was_active[name, k] = True

    def each(self) -> Iterator[tuple[str, int, torch.optim.Optimizer]]:
        for (name, k), optimizer in self.optimizers.items():
            yield name, k, optimizer

    def step(self, grads: dict[str, Tensor | None], masks: dict[str, Tensor]) -> None:
        for name, (groups, _) in self.parameters.items():
            grad = grads[name]
            rows = None if grad is None else neuron_views(grad, groups)
            for k, active in enumerate(masks[name].tolist()):
                self._step_neuron(name, k, rows[k] if rows else None, active)

    def _step_neuron(self, name: str, k: int, grad: Tensor | None, active: bool) -> None:
        optimizer = self.optimizers[name, k]
        (p,) = optimizer.param_groups[0]["params"]
        if active:
            if grad is not None:
                p.grad = grad.detach().contiguous().clone()
                optimizer.step()
        elif self.frozen_state == "reset" and self.was_active[name, k]:
            self.optimizers[name, k] = self.make([nn.Parameter(p.detach().clone())])
        elif self.frozen_state == "reference":
            self._reference_step(optimizer, p)
        self.was_active[name, k] = active

    @staticmethod
    def _reference_step(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> None:
        """The published code's rule for a frozen neuron, as a step on a gradient of 0 undone."""
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        decays = [(group, group["weight_decay"]) for group in optimizer.param_groups]
        for group, _ in decays:
            group["weight_decay"] = 0
        optimizer.step()
        for group, weight_decay in decays:
            group["weight_decay"] = weight_decay
        with torch.no_grad():
            p.copy_(before)
            for key in ("momentum_buffer", "exp_avg"):
                if optimizer.state[p].get(key) is not None:
                    optimizer.state[p][key].zero_()

    def value(self, name: str) -> Tensor:
        groups, value = self.parameters[name]
        for k, view in enumerate(neuron_views(value, groups)):
            view.copy_(self.optimizers[name, k].param_groups[0]["params"][0].detach())
        return value
