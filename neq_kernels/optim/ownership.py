"""Which of a model's parameters belong to neurons, re-read whenever the model has changed."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers import following_parameters, neuron_owners, unwrap


class OwnedParameter:
    """One parameter's neurons: where they lie, and which are active.

    Attributes:
        name: the parameter's name in the model.
        layout: where a neuron lies in the parameter.
        channels: the active set. With several owners a neuron is frozen only when it is frozen in
            all of them: the union of the active sets, as of the last :meth:`refresh`.
    """

    def __init__(
        self, name: str, parameter: Parameter, owners: list[tuple[ActiveChannels, NeuronLayout]]
    ) -> None:
        self.name = name
        self.layout = owners[0][1]
        self._owners = list({id(channels): channels for channels, _ in owners}.values())
        k = self.layout.n_neurons(parameter)
        for channels, layout in owners:
            if layout != self.layout or len(channels) != k:
                raise ValueError(
                    f"{name}: expected every layer that shares it to see the same neurons in it, "
                    f"got {k} at {self.layout} and {len(channels)} at {layout}"
                )
        self.channels = self._owners[0] if len(self._owners) == 1 else ActiveChannels(k)

    def refresh(self) -> None:
        """Bring ``channels`` up to date with the owners."""
        if len(self._owners) > 1:
            self.channels.set(torch.stack([c.mask for c in self._owners]).any(0))

    @property
    def all_active(self) -> bool:
        return self.channels.n_active == len(self.channels)

    def frozen(self, device: torch.device) -> Tensor:
        """The frozen neurons, int64 on ``device``."""
        return self.channels.order(device)[self.channels.n_active :]


class Ownership:
    """The owned parameters of a model, kept true by comparing the model with what was last read.

    Attributes:
        parameters: every owned parameter. Keys compare by identity.

    Args:
        model: a converted model; wrappers (data parallel, compiled) are seen through.

    Raises:
        ValueError: layers share a parameter but see different neurons in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._structure = _structure(self._model)
        self._following = list(following_parameters(self._model))
        self.parameters = self._read()

    def refresh(self, optimizer: Optimizer) -> list[Parameter]:
        """Re-read the model if it has changed, and bring every active set up to date.

        Returns:
            The parameters that are still the model's but owned by no neuron any more.

        Raises:
            RuntimeError: the optimizer holds an owned parameter that the model no longer has.
        """
        released: list[Parameter] = []
        structure = _structure(self._model)
        if not _same_objects(structure, self._structure):
            parameters = self._read()
            released = [p for p in self.parameters if p not in parameters]
            optimized = {p for group in optimizer.param_groups for p in group["params"]}
            for p in optimized.intersection(released).difference(self._model.parameters()):
                raise RuntimeError(
                    f"{self.parameters[p].name}: the optimizer holds a parameter that the model "
                    "has replaced (by model.to or an assignment), so its steps would be lost: "
                    "make the optimizer anew from model.parameters() and attach it"
                )
            self._structure, self.parameters = structure, parameters
            self._following = list(following_parameters(self._model))
        for following in self._following:
            _ = following.channels  # reading it brings it up to date
        for owned in self.parameters.values():
            owned.refresh()
        return released

    def names(self) -> dict[Parameter, str]:
        """The name of every parameter of the model."""
        return {p: name for name, p in self._model.named_parameters()}

    def _read(self) -> dict[Parameter, OwnedParameter]:
        names = self.names()
        return {
            p: OwnedParameter(names[p], p, who) for p, who in neuron_owners(self._model).items()
        }


def _structure(model: nn.Module) -> list[object]:
    """Every object the ownership map is made from, so that a change shows by identity."""
    found: list[object] = []
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if module is not None:
            attributes = module.__dict__
            found += (type(module), attributes.get("channels"), attributes.get("neq_following"))
            found += module._parameters.values()
            pending += module._modules.values()
    return found


def _same_objects(a: list[object], b: list[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
