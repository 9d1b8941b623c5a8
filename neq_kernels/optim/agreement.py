"""Notices active sets that differ between the ranks of a process group."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from neq_kernels.layers.base import NeuronLayer
from neq_kernels.process_group import in_process_group

INTERVAL = 100
_DIGEST_SIZE = 8


class Agreement:
    """Replicas with different masks drift apart without a word: every 100th step each rank leaves a
    hash of its masks in the process group's store, and reads those that the others left 100 steps
    before. There is no collective, and nobody is waited for. Ranks whose layers differ in name or
    size (stages of a pipeline) are not compared.
    """

    # Ranks attach their optimizers in the same order.
    _numbers: ClassVar[Iterable[int]] = itertools.count()

    def __init__(self) -> None:
        self._number = next(iter(self._numbers))
        self._steps = 0
        self._left: list[tuple[int, bytes]] = []

    def count(self, layers: Iterable[tuple[str, NeuronLayer]]) -> None:
        """Count a step, and compare if it is one of those.

        Args:
            layers: names and neuron layers of the model.

        Raises:
            RuntimeError: the ranks' masks differed one interval ago.
        """
        self._steps += 1
        if self._steps % INTERVAL or not in_process_group() or dist.get_world_size() == 1:
            return
        store: Any = dist.distributed_c10d._get_default_store()
        rank, own = dist.get_rank(), _digests(layers)
        store.set(self._key(self._steps, rank), own)
        before = [step for step, _ in self._left]
        self._left.append((self._steps, own))
        if not before:
            return
        if len(before) > 1:
            store.delete_key(self._key(before[0], rank))
            del self._left[0]
        self._compare(store, before[-1])

    def _compare(self, store: Any, step: int) -> None:
        own = dict(self._left)[step]
        ranks = range(dist.get_world_size())
        keys = {rank: self._key(step, rank) for rank in ranks}
        if not store.check(list(keys.values())):  # the rest of a rank that is behind or has left
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        ranks_with: dict[bytes, list[int]] = {}
        for rank, value in zip(keys, store.multi_get(list(keys.values())), strict=True):
            if value[:_DIGEST_SIZE] == own[:_DIGEST_SIZE]:
                ranks_with.setdefault(value, []).append(rank)
        if len(ranks_with) > 1:
            sets = "; ".join(
                f"rank{'s' * (len(some) > 1)} {', '.join(map(str, some))}"
                for some in ranks_with.values()
            )
            raise RuntimeError(
                f"expected the same active neurons on every rank, got {len(ranks_with)} different "
                f"sets at step {step} of the optimizer ({sets}), so the replicas drift apart: set "
                "masks alike on all ranks (a controller does if every rank calls its step())"
            )

    def _key(self, step: int, rank: int) -> str:
        return f"neq_kernels/masks/{self._number}/{step}/{rank}"


def _digests(layers: Iterable[tuple[str, NeuronLayer]]) -> bytes:
    """Of the layers' names and sizes, and of their masks."""
    structure = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    masks = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for name, layer in layers:
        structure.update(f"{name} {len(layer.channels)};".encode())
        masks.update(bytes(layer.channels.mask_on().view(torch.uint8).tolist()))
    return structure.digest() + masks.digest()
