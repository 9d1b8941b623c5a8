"""Whether frozen neurons stay where they are: they do once the optimizer is attached."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from neq_kernels.layers.base import NeuronLayer

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StillWatch:
    """Warns, once each, of frozen neurons that move and of a model with no optimizer attached.

    One number per parameter is kept: the sum of the bits of its frozen rows.

    Args:
        layers: the model's.
    """

    def __init__(self, layers: Mapping[str, NeuronLayer]) -> None:
        self._layers = layers
        self._seen: dict[tuple[str, int], tuple[object, int]] = {}
        self._steps = 0
        self._warned = False

    def remember(self) -> None:
        """From now on what is frozen has to stay where it is."""
        self._seen = self._read()

    def check(self) -> None:
        """A controller's step begins."""
        self._steps += 1
        if self._steps == 2 and not any(layer.anchor.optimizers for layer in self._layers.values()):
            warnings.warn(
                "no optimizer is attached to the model of this controller: expected "
                "neq.attach(optimizer, model) before training, or frozen neurons move; is a copy "
                "of the model trained?",
                stacklevel=3,
            )
        moved = self._moved()
        if moved is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"frozen neurons moved since the last step, those of {moved!r} for one: expected "
                "neq.attach(optimizer, model) for every optimizer that trains them (to load "
                "weights between two steps has the same effect)",
                stacklevel=3,
            )

    def _moved(self) -> str | None:
        """The name of a layer with frozen neurons that have moved."""
        if not self._seen:
            return None
        for key, (what, bits) in self._read().items():
            known = self._seen.get(key)
            if known is not None and known[0] == what and known[1] != bits:
                return key[0]
        return None

    def _read(self) -> dict[tuple[str, int], tuple[object, int]]:
        """For each layer and parameter with frozen rows, what was read and the sum of its bits."""
        sums: dict[tuple[str, int], tuple[object, Tensor]] = {}
        for name, layer in self._layers.items():
            for index, (parameter, channels, layout) in enumerate(layer.owners()):
                # Not a shard, nor something without data.
                if type(parameter) is not Parameter or parameter.is_meta:
                    continue
                if channels.n_active == len(channels):
                    continue
                rows = parameter.detach()
                if not channels.none_active:
                    order = channels.order(rows.device)
                    rows = layout.gather(rows, order[channels.n_active :])
                what = (channels.generation, rows.dtype, rows.shape)
                sums[name, index] = (what, _sum_of_bits(rows))
        numbers = _numbers([bits for _, bits in sums.values()])
        return {
            key: (what, number)
            for (key, (what, _)), number in zip(sums.items(), numbers, strict=True)
        }


def _sum_of_bits(tensor: Tensor) -> Tensor:
    integers = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
    return integers.sum(dtype=torch.int64)


def _numbers(sums: list[Tensor]) -> list[Any]:
    """On the host, by one copy per device."""
    numbers: dict[int, int] = {}
    for device in {bits.device for bits in sums}:
        here = [i for i, bits in enumerate(sums) if bits.device == device]
        numbers |= zip(here, torch.stack([sums[i] for i in here]).tolist(), strict=True)
    return [numbers[i] for i in range(len(sums))]
