"""What all controllers share: the layers, one safe way to change masks, history and state."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from neq_kernels.channels import ActiveChannels
from neq_kernels.controllers.still import StillWatch
from neq_kernels.conversion.repair import repair
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import named_neuron_layers, unwrap
from neq_kernels.process_group import broadcast_masks, device_of

Masks = dict[str, Tensor]
Pending = TypeVar("Pending")

_FORMAT = 1


class Controller(Generic[Pending]):
    """Decides once per epoch which neurons are updated in the next.

    Layers that share one :class:`~neq_kernels.channels.ActiveChannels` (tied weights) are decided
    together: a channel is active if any of them wants it active. At least one neuron of the model
    stays active; each controller says which.

    A controller decides about layers that learn: those of whose parameters none requires a gradient
    (the base layers under LoRA) are not looked at, and keep the mask they have. So do embeddings,
    and heads tied to them, unless ``embeddings=True``.

    :meth:`step` warns, once each, where frozen neurons have moved since the last one, because
    :func:`neq_kernels.attach` was forgotten, and, the second time, where no optimizer is attached
    to the model, because a copy of it is trained for instance.

    Under an initialised ``torch.distributed`` process group the constructor and :meth:`step` are
    collective: every rank calls them, and rank 0's masks hold everywhere.

    Args:
        model: a model with converted layers; wrappers (DistributedDataParallel, torch.compile)
            are seen through.
        embeddings: decide about embeddings too.

    Attributes:
        epoch: steps taken so far, the number of the epoch that comes.
        history: one JSON-serialisable dict per step: ``epoch`` (the epoch just trained, from 0),
            ``seconds`` spent in the step, and ``layers``, for each layer that it decides about a
            dict with ``active`` and ``total`` neurons in the epoch that follows; of an embedding,
            which has no MACs, ``active_elements`` and ``elements`` too.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no converted layer.
    """

    epoch: int
    history: list[dict[str, Any]]

    def __init__(self, model: nn.Module, *, embeddings: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self._model = unwrap(model)
        repair(self._model)
        self._layers: dict[str, NeuronLayer] = dict(named_neuron_layers(self._model))
        if not self._layers:
            raise ValueError(
                "model: expected converted layers, got none; call neq.convert(model) first (if you "
                "did: it has no layer that can be converted, see neq.conversion_report)"
            )
        if not isinstance(embeddings, bool):
            raise TypeError(f"embeddings: expected a bool, got {type(embeddings).__name__}")
        self._embeddings = embeddings
        self._still = StillWatch(self._layers)
        self._still.remember()
        self.epoch = 0
        self.history = []

    def step(self) -> None:
        """End an epoch: decide which neurons are active in the next one.

        Atomic: after an exception masks, state and history are as before the call.
        """
        started = time.perf_counter()
        self._still.check()
        masks, pending = self._decide()
        self._set_masks(masks, pending)
        entry = {"epoch": self.epoch, "seconds": 0.0, "layers": self._layer_history()}
        self.epoch += 1
        self.history.append(entry)
        entry["seconds"] = time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-equal resume needs: CPU tensors, numbers, strings, lists and dicts."""
        return {
            "controller": type(self).__name__,
            "format": _FORMAT,
            "epoch": self.epoch,
            "history": deepcopy(self.history),
            "masks": {name: layer.channels.mask for name, layer in self._layers.items()},
            **self._own_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; sets the masks too.

        Layers that the state does not know, because an earlier version had no neurons for them,
        stay active; one warning names them.

        Raises:
            TypeError: ``state`` is no mapping.
            ValueError: it is another controller's or another model's; the message lists what
                differs, and nothing has been loaded.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        differences = self._common_differences(state)
        if not differences:
            differences = self._own_differences(state)
        if differences:
            raise ValueError("state: does not fit this controller: " + "; ".join(differences))
        self._load_own(state)
        masks, decided = state["masks"], self._decided()
        for channels, names in self._groups():
            known = [masks[name] for name in names if name in masks]
            if known:
                channels.set(torch.stack(known).any(0))
            elif names[0] in decided:
                channels.reset()
        if new := self._unknown_to(state):
            warnings.warn(
                f"state: it knows nothing of these layers; their neurons stay active: {new}",
                stacklevel=2,
            )
        self._still.remember()
        self.epoch = state["epoch"]
        self.history = deepcopy(state["history"])

    def _decide(self) -> tuple[Masks, Pending]:
        """The mask each layer wants, and what :meth:`_accept` needs. Changes nothing."""
        raise NotImplementedError

    def _accept(self, pending: Pending) -> None:
        """The masks are set: take over what was computed with them."""
        raise NotImplementedError

    def _layer_history(self) -> dict[str, dict[str, Any]]:
        entries = {}
        for name, layer in self._decided().items():
            entry: dict[str, Any] = {
                "active": layer.channels.n_active,
                "total": len(layer.channels),
            }
            if layer.is_embedding:
                width = layer.weight.shape[1]
                entry["active_elements"] = entry["active"] * width
                entry["elements"] = entry["total"] * width
            entries[name] = entry
        return entries

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _own_differences(self, state: Mapping[str, Any]) -> list[str]:
        return []

    def _load_own(self, state: Mapping[str, Any]) -> None:
        pass

    def _groups(self) -> list[tuple[ActiveChannels, list[str]]]:
        """Each ActiveChannels object with the names of the layers that share it."""
        groups: dict[int, tuple[ActiveChannels, list[str]]] = {}
        for name, layer in self._layers.items():
            groups.setdefault(id(layer.channels), (layer.channels, []))[1].append(name)
        return list(groups.values())

    def _decided(self) -> dict[str, NeuronLayer]:
        """The layers that this controller decides about now."""
        names = {
            name
            for _, group in self._groups()
            if any(self._layers[name].learns for name in group)
            and (self._embeddings or not any(self._layers[name].is_embedding for name in group))
            for name in group
        }
        return {name: layer for name, layer in self._layers.items() if name in names}

    def _all_active(self) -> Masks:
        return {
            name: torch.ones(len(layer.channels), dtype=torch.bool, device="cpu")
            for name, layer in self._decided().items()
        }

    def _set_masks(self, decided: Masks, pending: Pending) -> None:
        """Set rank 0's masks, the union over layers that share; all of them or none."""
        masks = broadcast_masks(decided, device_of(self._model))
        before = [(channels, channels.mask) for channels, _ in self._groups()]
        try:
            for channels, names in self._groups():
                votes = [masks[name] for name in names if name in masks]
                if votes:
                    channels.set(torch.stack(votes).any(0))
            self._accept(pending)
        except BaseException:
            for channels, mask in before:
                channels.set(mask)
            raise
        self._still.remember()

    def _common_differences(self, state: Mapping[str, Any]) -> list[str]:
        kind, version = state.get("controller"), state.get("format")
        if kind != type(self).__name__ or version != _FORMAT:
            return [
                f"expected the state of a {type(self).__name__}, format {_FORMAT}, got "
                f"{kind!r}, format {version!r}"
            ]
        found = []
        epoch = state.get("epoch")
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            found.append(f"epoch: expected an int, at least 0, got {epoch!r}")
        history = state.get("history")
        if not isinstance(history, list) or not all(isinstance(e, dict) for e in history):
            found.append(f"history: expected a list of dicts, got {type(history).__name__}")
        return found + self._per_layer_differences(state, "masks", torch.bool)

    def _unknown_to(self, state: Mapping[str, Any]) -> list[str]:
        """The layers that have become neuron layers since the state was saved."""
        return sorted(self._layers.keys() - state["masks"].keys())

    def _per_layer_differences(
        self, state: Mapping[str, Any], key: str, dtype: torch.dtype
    ) -> list[str]:
        """Why ``state[key]`` is not one tensor of length K for each layer."""
        found = state.get(key)
        if not isinstance(found, Mapping):
            return [f"{key}: expected a dict of tensors, got {type(found).__name__}"]
        differences = []
        unknown = sorted(found.keys() - self._layers.keys())
        missing = sorted(self._layers.keys() - found.keys())
        is_older = missing == self._unknown_to(state) and bool(found) and not unknown
        if missing and not is_older:
            differences.append(f"{key}: missing layers {missing}")
        if unknown:
            differences.append(f"{key}: unknown layers {unknown}")
        for name in self._layers.keys() & found.keys():
            k, value = len(self._layers[name].channels), found[name]
            if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != (k,):
                got = (
                    f"{value.dtype} {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                differences.append(f"{key}: {name} expected {dtype} ({k},), got {got}")
        return differences
