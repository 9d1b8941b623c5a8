"""Which converted layers are a model's output layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neq_kernels.controllers.probe.batch import tensors_in
from neq_kernels.controllers.probe.probe import EMPTY_PROBE, Probe, watching
from neq_kernels.layers.base import NeuronLayer


def chosen(
    outputs: Iterable[str] | None, include_output: bool, layers: Mapping[str, NeuronLayer]
) -> set[str] | None:
    """The output layers as the arguments settle them; None: they have to be found.

    Raises:
        TypeError: ``outputs`` is not an iterable of names.
        ValueError: a name that is no converted layer, or both arguments given.
    """
    if outputs is None:
        return set() if include_output else None
    if include_output:
        raise ValueError("outputs: expected None together with include_output=True, got names")
    if isinstance(outputs, str) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs: expected a list of layer names, got {outputs!r}")
    names = set(outputs)
    if unknown := sorted(map(str, names - layers.keys())):
        raise ValueError(f"outputs: expected names among {list(layers)}, got {unknown}")
    return names


def trace(probe: Probe, layers: Mapping[str, NeuronLayer]) -> set[str] | None:
    """The converted layers that reach an output, and no further converted layer on any path to one,
    found on the first batch of the probe.

    A residual stream passes every layer on its way: only the last that writes into it counts, also
    where what follows (a tied head, a norm) was not converted. The autograd graph is walked from
    the outputs, and from the input of every layer, back to the nearest converted layers. It is made
    of the activations alone: the parameters take no part, and no gradient is computed.

    Returns:
        Names; none when no layer is on a differentiable path to an output. None when the probe
        (of this rank) is empty.
    """
    with probe.untouched():
        for _, batch in probe.batches():
            calls = _Calls()
            with torch.inference_mode(False), torch.enable_grad(), calls.recorded(layers):
                result = probe.run(batch, probe.frozen_state())
            return calls.last_before(tensors_in(result))
    return None


class _Calls:
    """The calls of the converted layers in one forward, and which feeds which."""

    def __init__(self) -> None:
        # By the leaf that stands for a call's output in the graph of what comes after.
        self._names: dict[int, str] = {}
        self._fed_by: dict[int, set[int]] = {}
        self._leaves: list[Tensor] = []
        self._inputs: dict[str, set[int]] = {}

    @contextmanager
    def recorded(self, layers: Mapping[str, NeuronLayer]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, layer in layers.items():
                hook = partial(self._before, name)
                handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(watching(layers, self._after))
            yield

    def last_before(self, outputs: Iterable[Tensor]) -> set[str]:
        """The layers whose calls reach ``outputs``, and feed no other call that does."""
        nearest = self._calls_before(outputs)
        reaching, waiting = set(nearest), list(nearest)
        while waiting:
            new = self._fed_by[waiting.pop()] - reaching
            reaching |= new
            waiting += new
        feeding = set[int]().union(*(self._fed_by[call] for call in reaching))
        return {self._names[call] for call in nearest - feeding}

    def _before(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs[name] = self._calls_before(tensors_in((args, kwargs)))

    def _after(self, name: str, output: Tensor) -> Tensor:
        # A sum, not detach().requires_grad_(): in-place activations may not change a leaf.
        leaf = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        self._leaves.append(leaf)
        self._names[id(leaf)] = name
        self._fed_by[id(leaf)] = self._inputs[name]
        return output.detach() + leaf

    def _calls_before(self, tensors: Iterable[Tensor]) -> set[int]:
        return _leaves(tensors) & self._names.keys()


def traced(found: Iterable[set[str] | None]) -> set[str]:
    """The union over ranks of what :func:`trace` found.

    Raises:
        ValueError: the probe is empty on all ranks, or nothing was found.
    """
    of_ranks = [names for names in found if names is not None]
    if not of_ranks:
        raise ValueError(EMPTY_PROBE)
    union = set[str]().union(*of_ranks)
    if not union:
        raise ValueError(
            "outputs: expected a differentiable path from a converted layer to the model's output, "
            "got none; name the output layers with outputs=[...] or give include_output=True (a "
            "forward= function has to return the model's output)"
        )
    return union


def last_in_order(layers: Mapping[str, NeuronLayer]) -> set[str]:
    """The last converted layer that is no norm layer; the last of all when there are only these."""
    names = [name for name, layer in layers.items() if not layer.is_norm] or list(layers)
    return {names[-1]}


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """The ids of the leaf tensors from which these were computed."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(waiting)
    leaves = set()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves
