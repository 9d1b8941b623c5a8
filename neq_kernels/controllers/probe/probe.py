"""The probe: a fixed set of inputs on which the neurons are watched, epoch after epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends.mha import get_fastpath_enabled, set_fastpath_enabled
from torch.func import functional_call
from torch.nn import Parameter

from neq_kernels.controllers.probe.batch import (
    Forward,
    call_model,
    fingerprint,
    is_empty,
    model_input,
    moved_copy,
)
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.process_group import device_of

EMPTY_PROBE = "probe: expected at least one batch that is not empty, got none"

Watcher = Callable[[str, Tensor], Tensor | None]


class Probe:
    """Runs a model over the same batches again and again, and leaves it as it was.

    Args:
        model: the unwrapped module.
        batches: a re-iterable of batches; see :class:`~neq_kernels.NEqController`.
        forward: ``forward(model, batch)`` instead of ``model(batch)``.

    Raises:
        TypeError: ``batches`` is not an iterable of batches, or ``forward`` not callable.
        ValueError: ``batches`` can be iterated once only.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], forward: Forward | None) -> None:
        if isinstance(batches, (Tensor, np.ndarray, Mapping, str, bytes)):
            raise TypeError(
                "probe: expected an iterable of batches, got one "
                f"{type(batches).__name__}; put it in a list"
            )
        if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
            raise TypeError(f"probe: expected an iterable of batches, got {type(batches).__name__}")
        if isinstance(batches, Iterator):
            raise ValueError(
                "probe: expected an iterable that can be iterated every epoch, got the one-shot "
                f"{type(batches).__name__}; give a list or a DataLoader"
            )
        if forward is not None and not callable(forward):
            raise TypeError(f"forward: expected a callable, got {type(forward).__name__}")
        self._batches = batches
        self._convert = model_input if forward is None else _unchanged
        self._model = _Forward(model, forward or call_model)
        self._n_passes = 0

    @property
    def device(self) -> torch.device:
        """Where the batches go: where the model is."""
        return device_of(self._model)

    def batches(self, expected: list[str] | None = None) -> Iterator[tuple[str, Any]]:
        """The batches that are not empty, each with its fingerprint.

        Raises:
            ValueError: they are not the ``expected`` ones.
        """
        found = 0
        for raw in self._batches:
            batch = self._convert(raw)
            if is_empty(batch):
                continue
            mark = fingerprint(batch)
            if expected is not None:
                _compare(found, mark, expected)
            found += 1
            yield mark, batch
        if expected is not None and found != len(expected):
            raise ValueError(
                f"probe: expected {len(expected)} batches as in the last pass, got {found}"
            )

    def run(self, batch: Any, state: dict[str, Tensor]) -> Any:
        """The model's output, with ``state`` in place of the parameters and buffers it names."""
        # A copy: a model that starts with an in-place operation would change the probe.
        inputs = moved_copy(batch, self.device)
        replaced = {f"model.{name}": tensor for name, tensor in state.items()}
        # The same draws in every forward: a model that is random in eval mode still compares.
        with _seeded(0, self._generators()):
            return functional_call(self._model, replaced, (inputs,))

    def frozen_state(self) -> dict[str, Tensor]:
        """For :meth:`run`: parameters that need no gradient, buffers that may be written."""
        model = self._model.model
        state: dict[str, Tensor] = {
            name: Parameter(parameter.detach(), requires_grad=False)
            for name, parameter in model.named_parameters()
        }
        return state | {name: b.detach().clone() for name, b in model.named_buffers()}

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Around one pass: evaluation mode, no gradients, nothing compiled, generators of our own.

        Afterwards the model and the generators are as before.
        """
        self._n_passes += 1
        modes = [(module, module.training) for module in self._model.model.modules()]
        with ExitStack() as stack:
            # A seed that changes from pass to pass: a probe that draws at random shows itself.
            stack.enter_context(_seeded(self._n_passes, self._generators()))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            # It passes by the layers of a Transformer, and the outputs to be watched.
            stack.callback(set_fastpath_enabled, get_fastpath_enabled())
            set_fastpath_enabled(False)
            try:
                # Not model.eval(): overrides of train() may do more than set the flag.
                for module, _ in modes:
                    module.training = False
                yield
            finally:
                for module, training in modes:
                    module.training = training

    def _generators(self) -> list[torch.Generator]:
        generators = [torch.default_generator]
        devices = {tensor.device for tensor in self._model.parameters()}
        for device in sorted(devices, key=str):
            if device.type in ("cuda", "xpu"):
                module = torch.get_device_module(device)
                generators.append(module.default_generators[device.index])
        return generators


@contextmanager
def watching(layers: Mapping[str, NeuronLayer], watcher: Watcher) -> Iterator[None]:
    """Give every output of these layers to ``watcher(name, output)``, which may replace it."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.watch(partial(watcher, name)).remove)
        yield


class _Forward(nn.Module):
    """``forward(model, batch)`` as a module, which is what ``functional_call`` can call."""

    def __init__(self, model: nn.Module, call: Forward) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, batch: Any) -> Any:
        return self.call(self.model, batch)


@contextmanager
def _seeded(seed: int, generators: list[torch.Generator]) -> Iterator[None]:
    """All global generators start from ``seed``; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    states = [generator.get_state() for generator in generators]
    try:
        random.seed(seed)
        np.random.seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _unchanged(batch: Any) -> Any:
    return batch


def _compare(index: int, found: str, expected: list[str]) -> None:
    if index >= len(expected):
        raise ValueError(f"probe: expected {len(expected)} batches as in the last pass, got more")
    if found != expected[index]:
        raise ValueError(
            f"probe: batch {index} is not the one of the last pass: expected {expected[index]!r}, "
            f"got {found!r}; the probe must give the same batches in the same order at every pass "
            "(a shuffling or augmenting loader does not)"
        )
