"""Neurons at equilibrium: freeze the neurons whose response to the probe no longer changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neq_kernels.controllers.arguments import check_choice, check_count, check_fraction
from neq_kernels.controllers.base import Controller, Masks
from neq_kernels.controllers.probe import output_layers
from neq_kernels.controllers.probe.batch import Forward
from neq_kernels.controllers.probe.last_epoch import MEMORIES, Comparison, Memory, MemoryName
from neq_kernels.controllers.probe.probe import EMPTY_PROBE, Probe
from neq_kernels.controllers.probe.similarity import SIMILARITIES, Similarity, SimilarityName
from neq_kernels.controllers.velocity import VELOCITIES, VelocityName
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.process_group import add_up, rank, together

PerLayer = dict[str, Tensor]


@dataclass(frozen=True)
class Response:
    """How each neuron responds to the probe.

    Attributes:
        phi, delta_phi, velocity: for each layer name φ, Δφ and v, float64 ``[K]``.
        measured: the layers that ran on the probe as they did one epoch ago. The others keep their
            last values.
    """

    phi: PerLayer
    delta_phi: PerLayer
    velocity: PerLayer
    measured: frozenset[str] = frozenset()


class NEqController(Controller[Response]):
    """Freezes the neurons at equilibrium, epoch by epoch.

    Source: Bragagnolo, Tartaglione, Grangetto, "To update or not to update? Neurons at equilibrium
    in deep models", NeurIPS 2022, arXiv 2207.09455. After epoch t, for each neuron: φ(t), the
    cosine similarity of its outputs on the probe now and one epoch ago; Δφ(t) = φ(t) − φ(t−1); a
    velocity v(t) that smooths Δφ. A neuron with |v(t)| ≤ ``eps`` is frozen in epoch t+1, and looked
    at again after it. At the start φ = 1, Δφ = 0, v = 0. A non-finite output counts as φ = 0.

    The constructor runs the probe once. It and :meth:`step` leave the model as it was: modes,
    buffers, gradients, hooks, random generators of torch, numpy and Python. The model is run
    unwrapped and uncompiled, in evaluation mode; forward hooks of the user fire.

    Under a process group both are collective. The probe may be sharded: φ is that of all shards
    together. With ``memory="activations"`` each rank's state_dict holds its own shard.

    The output layers (what they compute reaches an output, and no further converted layer) stay
    wholly active. So do layers that did not run on the probe, or ran differently than last epoch
    (routed layers). If nothing that ran would be active (possible with ``include_output=True``),
    the neuron with the largest |v| stays active.

    Args:
        model: a model with converted layers.
        probe: an iterable of batches, the same at every pass: a tensor (``model(x)``), a tuple or
            list (its first element), a dict (``model(**d)``). Moved to the model's device.
        eps: ε, finite, at least 0.
        mu: μ, in [0, 1].
        warmup: epochs that train everything; the first, which nothing can be compared with, does.
        velocity: ``"slide"`` (the paper) or ``"reference"`` (its public code).
        similarity: ``"neuron"``, one vector per neuron over the whole probe (the paper), or
            ``"sample"``, the mean of one cosine per sample (its public code).
        memory: ``"snapshot"`` keeps a copy of parameters and buffers and runs both models, one
            batch of activations at a time; ``"activations"`` keeps all outputs on the CPU (for
            models whose parameters cannot be replaced for a forward, such as sharded ones).
        forward: ``forward(model, batch)``, for any other kind of batch.
        outputs: names of the output layers instead of finding them.
        include_output: output layers may freeze as all others.
        embeddings: look at embeddings too: φ of a token is the cosine similarity of its row now and
            one epoch ago, whether the probe holds it or not. A head tied to an embedding is an
            output layer as a rule, and then both stay active without ``include_output=True``.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of range; an unknown name; no converted layer; a probe that is
            empty, can be read once only or runs none of the layers; no output layer found; a model
            that ``memory="snapshot"`` does not support. :meth:`step`: a probe other than in the
            last pass.
        RuntimeError: another rank failed.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Iterable[Any],
        *,
        eps: float = 1e-3,
        mu: float = 0.5,
        warmup: int = 1,
        velocity: VelocityName = "slide",
        similarity: SimilarityName = "neuron",
        memory: MemoryName = "snapshot",
        forward: Forward | None = None,
        outputs: Iterable[str] | None = None,
        include_output: bool = False,
        embeddings: bool = False,
    ) -> None:
        super().__init__(model, embeddings=embeddings)
        self._eps = check_fraction("eps", eps, math.inf)
        self._mu = check_fraction("mu", mu)
        self._warmup = check_count("warmup", warmup)
        check_choice("velocity", velocity, VELOCITIES)
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("memory", memory, MEMORIES)
        self._settings = {"velocity": velocity, "similarity": similarity, "memory": memory}
        self._velocity = VELOCITIES[velocity]
        self._similarity: type[Similarity] = SIMILARITIES[similarity]
        chosen = output_layers.chosen(outputs, include_output, self._layers)
        self._probe = Probe(self._model, probe, forward)
        self._memory: Memory = MEMORIES[memory](self._model)
        self._response = Response(self._everywhere(1.0), self._everywhere(0), self._everywhere(0))
        self._fingerprints, self._outputs = self._start(chosen)

    @property
    def outputs(self) -> list[str]:
        """The output layers, which stay active."""
        return [name for name in self._layers if name in self._outputs]

    @property
    def response(self) -> Response:
        """φ, Δφ and v after the last step."""
        return self._response

    def _everywhere(self, value: float) -> PerLayer:
        return {
            name: torch.full((len(layer.channels),), value, dtype=torch.float64, device="cpu")
            for name, layer in self._layers.items()
        }

    def _start(self, outputs: set[str] | None) -> tuple[list[list[str]], set[str]]:
        """First pass: the fingerprints of each rank's batches, and the output layers."""

        watched = self._decided()

        def first_pass() -> tuple[list[str], set[str], set[str] | None]:
            fingerprints, ran = self._memory.start(self._probe, watched)
            found = output_layers.trace(self._probe, self._layers) if outputs is None else outputs
            return fingerprints, ran, found

        passes = together(first_pass)
        fingerprints = [of_rank for of_rank, _, _ in passes]
        if not any(fingerprints):
            raise ValueError(EMPTY_PROBE)
        ran = set[str]().union(*(of_rank for _, of_rank, _ in passes))
        if not ran:
            raise ValueError(
                "probe: expected it to run converted layers that learn, got none that ran"
            )
        self._warned: set[str] = set()
        self._warn_of(watched.keys() - ran)
        if outputs is None:
            outputs = output_layers.traced(found for _, _, found in passes)
        return fingerprints, outputs

    def _decide(self) -> tuple[Masks, Response]:
        watched = self._decided()
        phi = self._measure(watched)
        self._warn_of(watched.keys() - phi.keys())
        last = self._response
        delta = last.delta_phi | {name: phi[name] - last.phi[name] for name in phi}
        velocity = last.velocity | {
            name: self._velocity(self._mu, last.velocity[name], delta[name], last.delta_phi[name])
            for name in phi
        }
        measured = frozenset(phi)
        response = Response(last.phi | phi, delta, velocity, measured)
        return self._masks(velocity, measured), response

    def _measure(self, watched: dict[str, NeuronLayer]) -> PerLayer:
        """φ of the layers that ran on the probe the same way now and one epoch ago."""
        comparison = Comparison(watched, self._similarity)

        def evaluate() -> tuple[set[str], set[str]]:
            self._memory.evaluate(self._probe, self._fingerprints[rank()], comparison)
            return set(comparison.sums()), comparison.incomparable

        passes = together(evaluate)
        ran = set[str]().union(*(of_rank for of_rank, _ in passes))
        incomparable = set[str]().union(*(of_rank for _, of_rank in passes))
        local = comparison.sums()
        sums = {
            name: local[name] if name in local else self._no_sums(len(layer.channels))
            for name, layer in watched.items()
            if name in ran - incomparable
        }
        added = add_up(sums, self._probe.device)
        return {name: self._similarity.phi(tensor) for name, tensor in added.items()}

    def _no_sums(self, k: int) -> Tensor:
        return torch.zeros(self._similarity.n_sums, k, dtype=torch.float64, device="cpu")

    def _masks(self, velocity: PerLayer, measured: frozenset[str]) -> Masks:
        masks = self._all_active()
        if self.epoch + 1 < self._warmup or not measured:
            return masks
        masks |= {name: velocity[name].abs() > self._eps for name in measured - self._outputs}
        if not any(bool(masks[name].any()) for name in measured):
            fastest = max(measured, key=lambda name: (float(velocity[name].abs().max()), name))
            masks[fastest][velocity[fastest].abs().argmax()] = True
        return masks

    def _warn_of(self, missing: Iterable[str]) -> None:
        """Name layers that cannot be measured, each once."""
        new = [name for name in self._layers if name in set(missing) - self._warned]
        if new:
            self._warned.update(new)
            warnings.warn(
                f"these layers did not run on the probe, or not as one epoch ago, or show their "
                f"neurons in no output; their neurons stay active: {new}",
                stacklevel=4,
            )

    def _accept(self, pending: Response) -> None:
        self._memory.commit()
        self._response = pending

    def _layer_history(self) -> dict[str, dict[str, Any]]:
        entries = super()._layer_history()
        for name in self._response.measured & entries.keys():
            entries[name]["phi_mean"] = float(self._response.phi[name].mean())
            speed = self._response.velocity[name].abs()
            entries[name]["velocity_abs_mean"] = float(speed.mean())
        return entries

    def _own_state(self) -> dict[str, Any]:
        response = self._response
        return {
            "settings": dict(self._settings),
            "phi": _cloned(response.phi),
            "delta_phi": _cloned(response.delta_phi),
            "velocity": _cloned(response.velocity),
            "measured": sorted(response.measured),
            "probe": [list(of_rank) for of_rank in self._fingerprints],
            "rank": rank(),
            "memory": self._memory.state(),
        }

    def _own_differences(self, state: Mapping[str, Any]) -> list[str]:
        if state.get("settings") != self._settings:
            return [f"settings: expected {self._settings}, got {state.get('settings')}"]
        found = []
        for key in ("phi", "delta_phi", "velocity"):
            found += self._per_layer_differences(state, key, torch.float64)
        measured = state.get("measured")
        if not isinstance(measured, list) or not self._layers.keys() >= set(measured):
            found.append(f"measured: expected a list of layer names, got {measured!r}")
        found += self._probe_differences(state.get("probe"), state.get("rank"))
        return found + self._memory.differences(state.get("memory"))

    def _probe_differences(self, probe: Any, of_rank: Any) -> list[str]:
        """The probe is the same; with another number of ranks it cannot be compared."""
        if not isinstance(probe, list) or not isinstance(of_rank, int) or of_rank >= len(probe):
            return [f"probe: expected fingerprints of each rank's batches, got {probe!r}"]
        own = self._fingerprints[rank()]
        if self._settings["memory"] == "activations":
            expected = probe[of_rank]
        elif len(probe) == len(self._fingerprints):
            expected = probe[rank()]
        else:
            return []
        return [] if own == expected else [f"probe: expected batches {own}, got {expected}"]

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self._memory.load(state["memory"])
        self._warned.update(self._unknown_to(state))
        self._response = Response(
            self._everywhere(1.0) | _cloned(state["phi"]),
            self._everywhere(0) | _cloned(state["delta_phi"]),
            self._everywhere(0) | _cloned(state["velocity"]),
            frozenset(state["measured"]),
        )


def _cloned(tensors: Mapping[str, Tensor]) -> PerLayer:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
