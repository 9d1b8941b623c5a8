"""Which of a model's parameters belong to neurons, re-read whenever the model has changed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.conversion.repair import repair
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.following import Following, followers
from neq_kernels.layers.ties import check_ties
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners, unwrap
from neq_kernels.optim.neurons_here import (
    FrozenElements,
    FrozenRows,
    RowsHere,
    cut_between_neurons,
    frozen_elements,
    rows_here,
)
from neq_kernels.sharding import is_distributed, local


class OwnedParameter:
    """One parameter's neurons: where they lie, and which are active.

    Attributes:
        name: the parameter's name in the model.
        owners: the active sets, and where their neurons lie in the parameter.
        layout: where a neuron lies in the parameter.
        channels: the active set. With several owners a neuron is frozen only when it is frozen in
            all of them: the union of the active sets, as of the last :meth:`refresh`. Where their
            layouts differ, one channel that is active while any neuron of any owner is.
        mixed: whether owners see different neurons in the parameter: an element is then frozen
            where all neurons that contain it are.

    Raises:
        ValueError: an owner has another number of neurons than the parameter has room for.
    """

    def __init__(
        self, name: str, parameter: Parameter, owners: list[tuple[ActiveChannels, NeuronLayout]]
    ) -> None:
        self.name = name
        self.layout = owners[0][1]
        self.owners = owners
        self._here: tuple[object, RowsHere] | None = None
        self._deciding = list({id(channels): channels for channels, _ in owners}.values())
        for channels, layout in owners:
            k = layout.n_neurons(parameter)
            if len(channels) != k:
                raise ValueError(
                    f"{name}: expected {len(channels)} neurons at {layout}, got {k}: its shape "
                    f"{tuple(parameter.shape)} is not the one that was converted"
                )
        self.mixed = any(layout != self.layout for _, layout in owners)
        if self.mixed:
            self.channels = ActiveChannels(1)
        else:
            self.channels = self._deciding[0] if len(self._deciding) == 1 else ActiveChannels(k)

    def refresh(self) -> None:
        """Bring ``channels`` up to date with the owners."""
        if self.mixed:
            self.channels.set([any(c.n_active for c in self._deciding)])
        elif len(self._deciding) > 1:
            self.channels.set(torch.stack([c.mask for c in self._deciding]).any(0))

    @property
    def all_active(self) -> bool:
        if self.mixed:
            return any(c.n_active == len(c) for c in self._deciding)
        return self.channels.n_active == len(self.channels)

    @property
    def none_active(self) -> bool:
        return self.channels.n_active == 0

    def rows_here(self, parameter: Parameter) -> RowsHere:
        """Its neurons in this process; not where owners see different ones."""
        if not is_distributed(parameter):
            return rows_here(parameter, self.layout, self.channels)
        known = (self.channels.generation, local(parameter).shape)
        if self._here is None or self._here[0] != known:
            self._here = known, rows_here(parameter, self.layout, self.channels)
        return self._here[1]

    def frozen_here(self, parameter: Parameter) -> FrozenRows | FrozenElements:
        """What of it is frozen in this process, whatever becomes of the active set."""
        if self.mixed or not cut_between_neurons(parameter, self.layout):
            return frozen_elements(parameter, self.owners)
        here = self.rows_here(parameter)
        return FrozenRows(here.layout, here.frozen.clone())

    def row_refusal(self, parameter: Parameter) -> str | None:
        """Why it cannot be stepped row by row, or None."""
        if self.mixed:
            return "the layers that share it see different neurons in it"
        if not cut_between_neurons(parameter, self.layout):
            return f"its shards do not end between neurons ({self.layout})"
        return None


class Ownership:
    """The owned parameters of a model, kept true by comparing the model with what was last read.

    Attributes:
        model: the one inside the wrappers.
        parameters: every owned parameter. Keys compare by identity.
        anchors: of the neuron layers; one after ``convert``.
        version: grows whenever :meth:`refresh` finds the model or an active set changed.

    Args:
        model: a converted model; wrappers (data parallel, compiled) are seen through.

    Raises:
        ValueError: a parameter's shape is not the one that was converted, or layers were tied, or
            separated, after ``convert``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        repair(self.model)
        self._places = self._named()
        self._structure = _Structure(self.model)
        self.parameters = self._read()
        self.version = 0
        self._generations: list[int] = []
        self._watch_active_sets()

    def refresh(self, optimizer: Optimizer) -> list[Parameter]:
        """Re-read the model if it has changed, and bring every active set up to date.

        Returns:
            The parameters that are still the model's but owned by no neuron any more.

        Raises:
            RuntimeError: the optimizer holds an owned parameter that the model no longer has, or
                that it has replaced in one of the layers that share it.
        """
        released: list[Parameter] = []
        if self._structure.has_changed():
            repair(self.model)
            structure, parameters = _Structure(self.model), self._read()
            released = [p for p in self.parameters if p not in parameters]
            optimized = {p for group in optimizer.param_groups for p in group["params"]}
            for p in optimized.intersection(released).difference(self.model.parameters()):
                raise RuntimeError(
                    f"{self.parameters[p].name}: the optimizer holds a parameter that the model "
                    "has replaced (by model.to or an assignment), so its steps would be lost: "
                    "make the optimizer anew from model.parameters() and attach it"
                )
            places = self._named()
            for name, old in self._places.items():
                new = places.get(name)
                if new is None or new is old or new in optimized or old not in optimized:
                    continue
                if old in self.parameters and new in parameters:
                    raise RuntimeError(
                        f"{name}: it was tied to {self.parameters[old].name} and is another "
                        "parameter now, which the optimizer does not hold, so it would not be "
                        "trained: make the optimizer anew from model.parameters() and attach it"
                    )
            self._structure, self.parameters, self._places = structure, parameters, places
            self._watch_active_sets()
            self.version += 1
        self.update_active_sets()
        return released

    def update_active_sets(self) -> None:
        """Bring every active set up to date."""
        generations = [channels.generation for channels in self._deciding]
        if generations != self._generations:
            for follower in self._followers:
                _ = follower.channels  # reading it brings it up to date
            for owned in self.parameters.values():
                owned.refresh()
            self._generations = generations
            self.version += 1

    def _watch_active_sets(self) -> None:
        layers = [layer for _, layer in named_neuron_layers(self.model)]
        self._followers = followers(self.model)
        self._deciding: list[ActiveChannels | Following] = list(
            dict.fromkeys(
                [
                    *(layer.channels for layer in layers),
                    *(follower.following for follower in self._followers),
                ]
            )
        )
        self.anchors = list({id(layer.anchor): layer.anchor for layer in layers}.values())
        self._generations = []  # equal to no model's: the next refresh reads it

    def layers(self) -> Iterator[tuple[str, NeuronLayer]]:
        """The model's neuron layers by name."""
        return named_neuron_layers(self.model)

    def names(self) -> dict[Parameter, str]:
        """The name of every parameter of the model."""
        return {p: name for name, p in self.model.named_parameters()}

    def _named(self) -> dict[str, Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _read(self) -> dict[Parameter, OwnedParameter]:
        check_ties(self.model)
        names = self.names()
        return {p: OwnedParameter(names[p], p, who) for p, who in neuron_owners(self.model).items()}


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
            map(dict.get, self._of_layers, itertools.repeat("anchor")),
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
