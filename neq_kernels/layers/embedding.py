"""Embeddings with rows that can be frozen."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.fx import Proxy

from neq_kernels import functional
from neq_kernels.layers.base import NeuronLayer, constructible
from neq_kernels.layers.masked import Masked, Owned


@constructible
class Embedding(NeuronLayer, nn.Embedding):
    """``torch.nn.Embedding`` with rows that can be frozen: one neuron per token.

    No dimension of its output enumerates them: ``channel_dim`` raises NotImplementedError.
    """

    is_embedding = True

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        return _reason_against(layer) or super().reason_against(layer)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return self._traced(input)
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


class EmbeddingWithItsOwnForward(Masked):
    """A subclass of ``torch.nn.Embedding`` that computes something else, scaled rows or positions:
    one neuron per row all the same, at the cost of the dense gradient."""

    is_embedding = True
    owned = (Owned("weight"),)
    output_dim = None

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        if cast(nn.Embedding, layer).sparse:
            return "sparse=True in a subclass with its own forward"
        return _reason_against(layer) or super().reason_against(layer)


def _reason_against(layer: nn.Module) -> str | None:
    if cast(nn.Embedding, layer).max_norm is not None:
        return "max_norm: its forward renormalizes the rows it reads, frozen ones too"
    return None
