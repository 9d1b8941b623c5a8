"""PyTorch's dense kernels in the place of the chosen ones, for all weight gradients of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import ClassVar
from weakref import WeakSet

import torch

from neq_kernels.channels import ActiveChannels
from neq_kernels.optim.forward_watch import ForwardWatch
from neq_kernels.optim.ownership import Ownership


class DenseServing:
    """Whether PyTorch's dense kernels serve one model's weight gradients, be it for a step or, by a
    verdict, until an active set of the model changes.

    Args:
        ownership: of the model.
    """

    _every: ClassVar[WeakSet[DenseServing]] = WeakSet()
    _loaded: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership
        self._served: list[ActiveChannels] = []
        self._is_verdict = False
        self._waiting: ForwardWatch | None = None
        for channels in self._channels():  # another optimizer may have had them served so
            channels.serve_densely(())
        self._every.add(self)
        self._wait_for_masks()

    def serve(self, densely: bool, *, by_verdict: bool = False) -> None:
        """By the dense kernels, or by the chosen ones, from the next forward on."""
        for channels in self._served:
            channels.serve_densely(())
        self._served = self._channels() if densely else []
        self._is_verdict = by_verdict
        for channels in self._served:
            channels.serve_densely(self._served)

    @property
    def by_verdict(self) -> bool:
        """Whether dense kernels serve until an active set changes."""
        return self._is_verdict and any(channels.served_densely for channels in self._served)

    def stop(self) -> None:
        """The chosen kernels serve, whatever was loaded."""
        self._every.discard(self)
        self._stop_waiting()
        self.serve(False)

    def _channels(self) -> list[ActiveChannels]:
        owned = self._ownership.parameters.values()
        return list(dict.fromkeys(channels for p in owned for channels, _ in p.owners))

    # --- in a checkpoint -------------------------------------------------------------------------

    @classmethod
    def verdicts(cls) -> list[str]:
        """The models, with their active sets, that dense kernels serve by a verdict."""
        serving = {s.digest() for s in cls._every if s.by_verdict}
        waiting = {s.digest() for s in cls._every if s._waiting is not None}
        return sorted(serving | (waiting & cls._loaded))

    @classmethod
    def load(cls, verdicts: Iterable[str]) -> None:
        """Let dense kernels serve exactly those models whose active sets, when the next step
        begins, are those of one of these verdicts."""
        cls._loaded = frozenset(verdicts)
        for serving in cls._every:
            serving._stop_waiting()
            serving.serve(False)
            serving._wait_for_masks()

    def digest(self) -> str:
        """Of the names, sizes and active sets of the model's parameters."""
        digest = hashlib.blake2b(digest_size=16)
        for owned in self._ownership.parameters.values():
            for channels, _ in owned.owners:
                digest.update(f"{owned.name} {len(channels)};".encode())
                digest.update(bytes(channels.mask_on().view(torch.uint8).tolist()))
        return digest.hexdigest()

    def _wait_for_masks(self) -> None:
        """Controllers may be loaded later than this; by the first forward they are."""
        if self._loaded:
            layers = [layer for _, layer in self._ownership.layers()]
            self._waiting = ForwardWatch(layers, self._look_at_masks)

    def _look_at_masks(self) -> None:
        self._stop_waiting()
        if self.digest() in self._loaded:
            self.serve(True, by_verdict=True)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None
