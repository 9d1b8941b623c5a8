"""Which of a model's parameters belong to neurons, re-read whenever the model has changed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.conversion.repair import repair
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import (
    following_parameters,
    named_neuron_layers,
    neuron_owners,
    unwrap,
)


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
        version: grows whenever :meth:`refresh` finds the model or an active set changed.

    Args:
        model: a converted model; wrappers (data parallel, compiled) are seen through.

    Raises:
        ValueError: layers share a parameter but see different neurons in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        repair(self._model)
        self._structure = _Structure(self._model)
        self.parameters = self._read()
        self.version = 0
        self._generations: list[int] = []
        self._watch_active_sets()

    def refresh(self, optimizer: Optimizer) -> list[Parameter]:
        """Re-read the model if it has changed, and bring every active set up to date.

        Returns:
            The parameters that are still the model's but owned by no neuron any more.

        Raises:
            RuntimeError: the optimizer holds an owned parameter that the model no longer has.
        """
        released: list[Parameter] = []
        if self._structure.has_changed():
            repair(self._model)
            structure, parameters = _Structure(self._model), self._read()
            released = [p for p in self.parameters if p not in parameters]
            optimized = {p for group in optimizer.param_groups for p in group["params"]}
            for p in optimized.intersection(released).difference(self._model.parameters()):
                raise RuntimeError(
                    f"{self.parameters[p].name}: the optimizer holds a parameter that the model "
                    "has replaced (by model.to or an assignment), so its steps would be lost: "
                    "make the optimizer anew from model.parameters() and attach it"
                )
            self._structure, self.parameters = structure, parameters
            self._watch_active_sets()
            self.version += 1
        generations = [channels.generation for channels in self._deciding]
        if generations != self._generations:
            for following in self._following:
                _ = following.channels  # reading it brings it up to date
            for owned in self.parameters.values():
                owned.refresh()
            self._generations = generations
            self.version += 1
        return released

    def _watch_active_sets(self) -> None:
        layers = [layer for _, layer in named_neuron_layers(self._model)]
        self._deciding = list({id(layer.channels): layer.channels for layer in layers}.values())
        self._following = list(following_parameters(self._model))
        self._generations = []  # equal to no model's: the next refresh reads it

    def names(self) -> dict[Parameter, str]:
        """The name of every parameter of the model."""
        return {p: name for name, p in self._model.named_parameters()}

    def _read(self) -> dict[Parameter, OwnedParameter]:
        names = self.names()
        return {
            p: OwnedParameter(names[p], p, who) for p, who in neuron_owners(self._model).items()
        }


class _Structure:
    """Every object the ownership map is made from, so that a change shows by identity."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[nn.Module] = []
        pending: list[nn.Module | None] = [model]
        while pending:
            module = pending.pop()
            if module is not None:
                self._modules.append(module)
                pending += module._modules.values()
        self._attributes = [module.__dict__ for module in self._modules]
        self._of_layers = [m.__dict__ for m in self._modules if isinstance(m, NeuronLayer)]
        # Views show what the dicts hold later.
        self._held: list[Iterable[object]] = []
        for module in self._modules:
            self._held += (module._parameters.values(), module._modules.values())
        self._objects = remember(self._read())

    def has_changed(self) -> bool:
        return not same_objects(self._objects, self._read())

    def _read(self) -> Iterator[object]:
        return itertools.chain(
            map(type, self._modules),
            map(dict.get, self._attributes, itertools.repeat("neq_following")),
            map(dict.get, self._of_layers, itertools.repeat("channels")),
            map(dict.get, self._of_layers, itertools.repeat("_parameters")),
            itertools.chain.from_iterable(self._held),
        )


_END = object()


def remember(objects: Iterable[object]) -> list[object]:
    """What :func:`same_objects` compares with later."""
    return [*objects, _END]


def same_objects(remembered: list[object], objects: Iterable[object]) -> bool:
    """Whether these are the remembered ones, by identity, no more and no fewer."""
    return all(map(operator.is_, remembered, itertools.chain(objects, (_END,))))
