"""Random frozen neurons: the baseline NEq is measured against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neq_kernels.controllers.arguments import check_count, check_fraction
from neq_kernels.controllers.base import Controller, Masks
from neq_kernels.controllers.probe import output_layers
from neq_kernels.controllers.probe.batch import Forward
from neq_kernels.controllers.probe.probe import Probe
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.process_group import together


class StochasticController(Controller[Tensor]):
    """Freezes, epoch by epoch, a fresh random set of exactly ``int(p * K)`` neurons per layer.

    Source: the Stochastic(p) baseline of the NEq paper (arXiv 2207.09455). Layers that share
    weights draw once. The output layers stay wholly active. With ``include_output=True`` they are
    drawn too, and if nothing at all would be active (``p=1``), one neuron of the last conv or
    linear layer stays so.

    Args:
        model: a model with converted layers.
        p: frozen share, in [0, 1].
        warmup: epochs that train everything; 0 draws in the constructor.
        seed: of the controller's own generator; no other random number is touched.
        probe, forward: inputs as for :class:`~neq_kernels.NEqController`; used once, to find the
            output layers (what they compute reaches no further converted layer). Without them the
            last conv or linear layer in registration order is taken.
        outputs: names of the output layers instead.
        include_output: no output layer is exempt.
        embeddings: draw rows of embeddings too, and of heads tied to them (which are output layers
            as a rule).

    Raises:
        TypeError: an argument of another type.
        ValueError: ``p`` or ``warmup`` out of range, unknown names in ``outputs``, ``outputs``
            together with ``include_output``, an empty probe, no converted layer.
    """

    def __init__(
        self,
        model: nn.Module,
        p: float,
        *,
        warmup: int = 1,
        seed: int = 0,
        probe: Iterable[Any] | None = None,
        forward: Forward | None = None,
        outputs: Iterable[str] | None = None,
        include_output: bool = False,
        embeddings: bool = False,
    ) -> None:
        super().__init__(model, embeddings=embeddings)
        self._p = check_fraction("p", p)
        self._warmup = check_count("warmup", warmup)
        self._generator = torch.Generator("cpu").manual_seed(check_count("seed", seed))
        self._outputs = self._find_outputs(probe, forward, outputs, include_output)
        if self._warmup == 0:
            self._set_masks(*self._draw())

    @property
    def outputs(self) -> list[str]:
        """The output layers, which stay active."""
        return [name for name in self._layers if name in self._outputs]

    def _find_outputs(
        self,
        probe: Iterable[Any] | None,
        forward: Forward | None,
        outputs: Iterable[str] | None,
        include_output: bool,
    ) -> set[str]:
        chosen = output_layers.chosen(outputs, include_output, self._layers)
        if chosen is not None:
            return chosen
        if probe is None:
            return output_layers.last_in_order(_with_outputs(self._layers))
        watched = Probe(self._model, probe, forward)
        return output_layers.traced(together(lambda: output_layers.trace(watched, self._layers)))

    def _decide(self) -> tuple[Masks, Tensor]:
        if self.epoch + 1 < self._warmup:
            return self._all_active(), self._generator.get_state()
        return self._draw()

    def _draw(self) -> tuple[Masks, Tensor]:
        """Masks, and the generator's state after drawing them."""
        generator = torch.Generator("cpu")
        generator.set_state(self._generator.get_state())
        masks = self._all_active()
        for channels, names in self._groups():
            if names[0] not in masks:
                continue
            k = len(channels)
            frozen = torch.randperm(k, generator=generator, device="cpu")[: int(self._p * k)]
            if self._outputs.isdisjoint(names):
                for name in names:
                    masks[name][frozen] = False
        if masks and not any(bool(mask.any()) for mask in masks.values()):
            (last,) = output_layers.last_in_order(_with_outputs(self._decided()))
            masks[last][0] = True
        return masks, generator.get_state()

    def _accept(self, pending: Tensor) -> None:
        self._generator.set_state(pending)

    def _own_state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def _own_differences(self, state: Mapping[str, Any]) -> list[str]:
        try:
            torch.Generator("cpu").set_state(state["generator"])
        except (KeyError, TypeError, RuntimeError) as error:
            return [f"generator: no generator state ({type(error).__name__}: {error})"]
        return []

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"])


def _with_outputs(layers: Mapping[str, NeuronLayer]) -> Mapping[str, NeuronLayer]:
    """Without embeddings, unless there is nothing else."""
    return {name: layer for name, layer in layers.items() if not layer.is_embedding} or layers
