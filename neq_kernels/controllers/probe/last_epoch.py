"""What a controller remembers of last epoch, and how it compares with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from neq_kernels.controllers.probe.probe import Probe, watching
from neq_kernels.controllers.probe.similarity import NeuronSimilarity, Similarity
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.process_group import in_process_group

MemoryName = Literal["snapshot", "activations"]
Layers = Mapping[str, NeuronLayer]
Outputs = dict[str, list[Tensor]]

_PERTURBED = 1e-6


class Comparison:
    """Last epoch's outputs against this epoch's, reduced layer by layer; for an embedding the rows
    of its table, whatever tokens the probe holds.

    Attributes:
        layers: those that are compared.
        incomparable: layers whose calls or shapes were others than last epoch (routed layers).
    """

    def __init__(self, layers: Layers, similarity: type[Similarity]) -> None:
        self.layers = layers
        self._similarity = {name: similarity() for name in layers}
        self._old: Outputs = {}
        self.incomparable: set[str] = set()

    def start_batch(self, old: Outputs) -> None:
        """``old`` holds the outputs of last epoch's model for the batch that comes."""
        self._old = {name: list(outputs) for name, outputs in old.items()}

    def compare(self, name: str, output: Tensor) -> None:
        """The watcher of this epoch's forward."""
        waiting = self._old.get(name)
        if not waiting or waiting[0].shape != output.shape:
            self.incomparable.add(name)
            return
        old = waiting.pop(0).to(output.device, output.dtype)
        if output.numel():
            layer = self.layers[name]
            dim = 0 if layer.is_embedding else layer.channel_dim(output)
            self._similarity[name].add(old, output, dim)

    def end_batch(self) -> None:
        self.incomparable.update(name for name, waiting in self._old.items() if waiting)
        self._old = {}
        for similarity in self._similarity.values():
            similarity.end_batch()

    def compare_tables(self, old: Outputs, new: Outputs) -> None:
        """Of embeddings, each as if it were one output."""
        self.start_batch(old)
        for name, (table,) in new.items():
            self.compare(name, table)
        self.end_batch()

    def sums(self) -> dict[str, Tensor]:
        """Of each layer that ran: float64 ``[n, K]``."""
        every = {name: similarity.sums() for name, similarity in self._similarity.items()}
        return {name: sums for name, sums in every.items() if sums is not None}


class Memory(Protocol):
    """The φ memory. Nothing but ``start``, ``commit`` and ``load`` changes it."""

    def start(self, probe: Probe, layers: Layers) -> tuple[list[str], set[str]]:
        """First pass: remember. Returns the batches' fingerprints and the layers that ran;
        embeddings always do."""

    def evaluate(self, probe: Probe, expected: list[str], comparison: Comparison) -> None:
        """Run the probe on this epoch's model, against what is remembered."""

    def commit(self) -> None:
        """From now on remember the model just evaluated."""

    def state(self) -> Any:
        """Tensors on the CPU, in dicts and lists."""

    def differences(self, state: Any) -> list[str]:
        """Why ``state`` cannot be loaded; empty when it can."""

    def load(self, state: Any) -> None:
        """Take over what :meth:`state` gave."""


class Snapshot:
    """Last epoch's parameters and buffers: one copy of the model.

    Old and new model run over the probe together, batch by batch, so no more than one batch of
    activations is held.

    Raises (on :meth:`start`):
        ValueError: the model cannot run with other tensors in place of its parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = {name: t.detach().clone() for name, t in _named_tensors(model)}

    def start(self, probe: Probe, layers: Layers) -> tuple[list[str], set[str]]:
        if in_process_group() and _is_distributed(self._model):
            raise ValueError(_unusable("its parameters are sharded"))
        fingerprints: list[str] = []
        ran: set[str] = set()
        checked = False
        buffers = _copied_buffers(self._model)

        def note(name: str, output: Tensor) -> None:
            if output.numel():
                ran.add(name)

        with probe.untouched():
            for fingerprint, batch in probe.batches():
                with watching(_with_outputs(layers), note):
                    probe.run(batch, buffers)
                if ran and not checked:
                    self._check_replacement(probe, batch, layers)
                    checked = True
                fingerprints.append(fingerprint)
        return fingerprints, ran | _tables(layers).keys()

    def evaluate(self, probe: Probe, expected: list[str], comparison: Comparison) -> None:
        self._check_unchanged()
        old, new = self._remembered(), _copied_buffers(self._model)
        tables = _tables(comparison.layers)
        names = self._names()
        remembered = {n: [old[names[id(comparison.layers[n].weight)]]] for n in tables}
        comparison.compare_tables(remembered, tables)
        with probe.untouched():
            for _, batch in probe.batches(expected):
                self._compare_batch(probe, batch, old, new, comparison)

    def commit(self) -> None:
        # In place: at no time are there two copies.
        for name, tensor in _named_tensors(self._model):
            known = self._tensors[name]
            if known.dtype == tensor.dtype and known.device == tensor.device:
                known.copy_(tensor.detach())
            else:
                self._tensors[name] = tensor.detach().clone()

    def state(self) -> dict[str, Tensor]:
        return {name: t.to("cpu", copy=True) for name, t in self._tensors.items()}

    def differences(self, state: Any) -> list[str]:
        if not isinstance(state, dict):
            return [f"memory: expected a dict of tensors, got {type(state).__name__}"]
        return _tensor_differences("memory", self._tensors, state)

    def load(self, state: dict[str, Tensor]) -> None:
        self._tensors = {
            name: state[name].to(known.device, known.dtype, copy=True)
            for name, known in self._tensors.items()
        }

    def _remembered(self) -> dict[str, Tensor]:
        """The remembered tensors where the model is now; buffers as copies, forwards write them."""
        buffers = {name for name, _ in self._model.named_buffers()}
        return {
            name: self._tensors[name].to(tensor.device, tensor.dtype, copy=name in buffers)
            for name, tensor in _named_tensors(self._model)
        }

    def _compare_batch(
        self,
        probe: Probe,
        batch: Any,
        old: dict[str, Tensor],
        new: dict[str, Tensor],
        comparison: Comparison,
    ) -> None:
        outputs: Outputs = {}

        def keep(name: str, output: Tensor) -> None:
            # A copy: an in-place activation may overwrite the output.
            outputs.setdefault(name, []).append(output.clone())

        layers = _with_outputs(comparison.layers)
        with watching(layers, keep):
            probe.run(batch, old)
        comparison.start_batch(outputs)
        outputs.clear()
        with watching(layers, comparison.compare):
            probe.run(batch, new)
        comparison.end_batch()

    def _names(self) -> dict[int, str]:
        return {id(t): name for name, t in _named_tensors(self._model)}

    def _check_replacement(self, probe: Probe, batch: Any, layers: Layers) -> None:
        """Perturbed weights must give other outputs, or every φ would silently be 1."""
        names = self._names()
        generator = torch.Generator("cpu").manual_seed(0)
        perturbed = {}
        for layer in layers.values():
            for parameter, _ in layer.neuron_parameters():
                scale = parameter.detach().double().square().mean().sqrt().item() or 1.0
                noise = torch.randn(parameter.shape, generator=generator, device="cpu") * scale
                perturbed[names[id(parameter)]] = parameter.detach() + noise.to(parameter)
        comparison = Comparison(layers, NeuronSimilarity)
        old, new = self._remembered() | perturbed, _copied_buffers(self._model)
        self._compare_batch(probe, batch, old, new, comparison)
        for dot, square_a, square_b in comparison.sums().values():
            distance = square_a + square_b - 2 * dot
            if bool((distance > _PERTURBED * (square_a + square_b)).any()):
                return
        if not comparison.incomparable:
            raise ValueError(_unusable("its outputs did not follow when its weights were replaced"))

    def _check_unchanged(self) -> None:
        found = _tensor_differences("model", self._tensors, dict(_named_tensors(self._model)))
        if found:
            raise ValueError(
                "model: its tensors are not those this controller was made for: " + "; ".join(found)
            )


class Activations:
    """Last epoch's outputs of every watched layer on the whole probe, and the tables of watched
    embeddings, kept on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._outputs: list[Outputs] = []
        self._tables: Outputs = {}
        self._pending: tuple[list[Outputs], Outputs] = ([], {})

    def start(self, probe: Probe, layers: Layers) -> tuple[list[str], set[str]]:
        fingerprints, self._outputs = self._pass(probe, layers)
        self._tables = _on_cpu(_tables(layers))
        ran = {
            name
            for batch in (*self._outputs, self._tables)
            for name, outputs in batch.items()
            if any(output.numel() for output in outputs)
        }
        return fingerprints, ran

    def evaluate(self, probe: Probe, expected: list[str], comparison: Comparison) -> None:
        _, outputs = self._pass(probe, comparison.layers, expected, comparison)
        tables = _tables(comparison.layers)
        comparison.compare_tables(self._tables, tables)
        self._pending = outputs, _on_cpu(tables)

    def commit(self) -> None:
        (self._outputs, self._tables), self._pending = self._pending, ([], {})

    def state(self) -> list[Outputs]:
        """The tables, where there are any, after the outputs of the last batch."""
        tables = [self._tables] if self._tables else []
        return [_on_cpu(part) for part in (*self._outputs, *tables)]

    def differences(self, state: Any) -> list[str]:
        if not isinstance(state, list) or not all(map(_is_outputs, state)):
            return ["memory: expected for each batch a dict of lists of tensors"]
        n = len(self._outputs)
        if len(state) not in (n, n + 1):
            return [f"memory: expected {n} batches, got {len(state)}"]
        found = []
        for index, (known, saved) in enumerate(
            zip((*self._outputs, self._tables), state, strict=False)
        ):
            # Layers that only one of them has seen stay active for an epoch.
            both = known.keys() & saved.keys()
            found += _tensor_differences(
                f"memory, batch {index}",
                _numbered({name: known[name] for name in both}),
                _numbered({name: saved[name] for name in both}),
            )
        return found

    def load(self, state: list[Outputs]) -> None:
        n = len(self._outputs)
        self._outputs = [_on_cpu(batch) for batch in state[:n]]
        self._tables = _on_cpu(state[n]) if len(state) > n else {}

    def _pass(
        self,
        probe: Probe,
        layers: Layers,
        expected: list[str] | None = None,
        comparison: Comparison | None = None,
    ) -> tuple[list[str], list[Outputs]]:
        fingerprints: list[str] = []
        recorded: list[Outputs] = []
        buffers = _copied_buffers(self._model)

        def watch(name: str, output: Tensor) -> None:
            # A copy: an in-place activation may overwrite the output.
            recorded[-1].setdefault(name, []).append(output.to("cpu", copy=True))
            if comparison is not None:
                comparison.compare(name, output)

        with probe.untouched():
            for fingerprint, batch in probe.batches(expected):
                if comparison is not None:
                    comparison.start_batch(self._outputs[len(recorded)])
                fingerprints.append(fingerprint)
                recorded.append({})
                with watching(_with_outputs(layers), watch):
                    probe.run(batch, buffers)
                if comparison is not None:
                    comparison.end_batch()
        return fingerprints, recorded


def _with_outputs(layers: Layers) -> Layers:
    """Those that are compared by their outputs."""
    return {name: layer for name, layer in layers.items() if layer.shows_neurons}


def _tables(layers: Layers) -> Outputs:
    """The weights of embeddings."""
    return {name: [layer.weight.detach()] for name, layer in layers.items() if layer.is_embedding}


def _on_cpu(outputs: Outputs) -> Outputs:
    """A copy."""
    return {
        name: [tensor.to("cpu", copy=True) for tensor in tensors]
        for name, tensors in outputs.items()
    }


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, a shared one under its first name only."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _is_outputs(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(calls, list) for calls in value.values())


def _numbered(outputs: Any) -> dict[str, Any]:
    return {f"{name} call {i}": t for name, calls in outputs.items() for i, t in enumerate(calls)}


def _tensor_differences(
    what: str, expected: Mapping[str, Tensor], found: Mapping[str, Any]
) -> list[str]:
    differences = []
    if missing := sorted(expected.keys() - found.keys()):
        differences.append(f"{what}: missing {missing}")
    if unknown := sorted(found.keys() - expected.keys()):
        differences.append(f"{what}: unknown {unknown}")
    for name in expected.keys() & found.keys():
        shape, got = tuple(expected[name].shape), found[name]
        if not isinstance(got, Tensor):
            differences.append(f"{what}: {name} is a {type(got).__name__}, not a tensor")
        elif tuple(got.shape) != shape:
            differences.append(f"{what}: {name} expected shape {shape}, got {tuple(got.shape)}")
    return differences


def _is_distributed(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in model.modules())


def _unusable(reason: str) -> str:
    return f"memory: 'snapshot' does not support this model ({reason}); give memory='activations'"


MEMORIES: dict[MemoryName, type[Snapshot] | type[Activations]] = {
    "snapshot": Snapshot,
    "activations": Activations,
}
