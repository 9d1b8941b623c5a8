"""Embeddings with rows that can be frozen."""

from __future__ import annotations

from torch import Tensor, nn

from neq_kernels import functional
from neq_kernels.layers.base import NeuronLayer, constructible


@constructible
class Embedding(NeuronLayer, nn.Embedding):
    """``torch.nn.Embedding`` with rows that can be frozen: one neuron per token.

    No dimension of its output enumerates them: ``channel_dim`` raises NotImplementedError.
    """

    is_embedding = True
    bias: None = None

    def forward(self, input: Tensor) -> Tensor:
        weight, _ = self._learned()
        out = functional.embedding(
            input,
            weight,
            self.channels,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        return self._anchored(out)
