"""How alike a neuron's outputs are now and one epoch ago: φ, a cosine per neuron."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from neq_kernels.ops import channel_similarity

SimilarityName = Literal["neuron", "sample"]

_ZERO = 1e-8


def cosine(dot: Tensor, square_a: Tensor, square_b: Tensor) -> Tensor:
    """Cosine similarity from inner products, element by element.

    A vector counts as zero when its norm is at most 1e-8.

    Args:
        dot, square_a, square_b: float64, one shape: ``a·b``, ``a·a`` and ``b·b``.

    Returns:
        float64 in [-1, 1]. Two zero vectors: 1. Exactly one: 0. Non-finite sums: 0. Equal
        vectors: exactly 1.
    """
    zero_a, zero_b = square_a <= _ZERO**2, square_b <= _ZERO**2
    # One square root: sqrt(x * x) == x in IEEE arithmetic, sqrt(x) * sqrt(x) is not.
    angle = (dot / (square_a * square_b).sqrt()).clamp(-1, 1)
    return torch.where(zero_a | zero_b, (zero_a & zero_b).double(), angle.nan_to_num(0.0))


class Similarity(Protocol):
    """Sums over the probe from which the φ of one layer follows; they add up across ranks.

    Attributes:
        n_sums: how many sums per neuron.
    """

    n_sums: ClassVar[int]

    def add(self, old: Tensor, new: Tensor, dim: int) -> None:
        """Take in one call of the layer; ``dim`` enumerates the neurons."""

    def end_batch(self) -> None:
        """All calls of one forward have been added."""

    def sums(self) -> Tensor | None:
        """float64 ``[n, K]``, or None when nothing was added."""

    @staticmethod
    def phi(sums: Tensor) -> Tensor:
        """float64 ``[K]``: φ from the sums, added over all ranks."""


class NeuronSimilarity:
    """One vector per neuron over all samples and positions of the probe (the NEq paper)."""

    n_sums: ClassVar[int] = 3

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, old: Tensor, new: Tensor, dim: int) -> None:
        sums = channel_similarity(old, new, dim)
        self._sums = sums if self._sums is None else self._sums + sums

    def end_batch(self) -> None:
        """Nothing to close: batches are parts of one vector."""

    def sums(self) -> Tensor | None:
        return self._sums

    @staticmethod
    def phi(sums: Tensor) -> Tensor:
        return cosine(sums[0], sums[1], sums[2])


class SampleSimilarity:
    """The mean over samples of a cosine per sample (the public code of NEq).

    Dimension 0 of an output enumerates the samples; an output without a batch dimension is one
    sample. Calls of a layer in the same forward are parts of the same vectors when they have the
    same number of samples.
    """

    n_sums: ClassVar[int] = 2

    def __init__(self) -> None:
        self._batch: dict[int, Tensor] = {}
        self._sums: Tensor | None = None

    def add(self, old: Tensor, new: Tensor, dim: int) -> None:
        a, b = (_by_sample_and_neuron(t, dim).double() for t in (old, new))
        sums = torch.stack([(a * b).sum(-1), (a * a).sum(-1), (b * b).sum(-1)])
        n_samples = len(a)
        known = self._batch.get(n_samples)
        self._batch[n_samples] = sums if known is None else known + sums

    def end_batch(self) -> None:
        for sums in self._batch.values():
            cosines = cosine(sums[0], sums[1], sums[2])
            total = torch.stack([cosines.sum(0), torch.ones_like(cosines).sum(0)])
            self._sums = total if self._sums is None else self._sums + total
        self._batch.clear()

    def sums(self) -> Tensor | None:
        return self._sums

    @staticmethod
    def phi(sums: Tensor) -> Tensor:
        return sums[0] / sums[1]


def _by_sample_and_neuron(output: Tensor, dim: int) -> Tensor:
    """``[samples, K, positions]``."""
    if dim % output.dim() == 0:
        output, dim = output.unsqueeze(0), 1
    return output.movedim(dim, 1).flatten(2) if output.dim() > 2 else output.unsqueeze(-1)


SIMILARITIES: dict[SimilarityName, type[NeuronSimilarity] | type[SampleSimilarity]] = {
    "neuron": NeuronSimilarity,
    "sample": SampleSimilarity,
}
