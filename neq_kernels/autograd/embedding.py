"""The backward of a lookup in a table of embeddings, of which only some rows are active."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neq_kernels.autograd.call_state import check_unchanged
from neq_kernels.channels import ActiveChannels


class Lookup(NamedTuple):
    """The options of ``F.embedding`` that its backward depends on."""

    padding_idx: int | None
    scale_grad_by_freq: bool
    sparse: bool

    def __call__(self, input: Tensor, weight: Tensor) -> Tensor:
        """PyTorch's own lookup."""
        return F.embedding(
            input,
            weight,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )


class EmbeddingFunction(torch.autograd.Function):
    """The gradient is linear in that of the output and depends on nothing else but the tokens: made
    of PyTorch's functions alone, it can be differentiated again, frozen rows being constants."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, input: Tensor, channels: ActiveChannels, lookup: Lookup
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.channels, ctx.generation = channels, channels.generation
        ctx.lookup = lookup
        return lookup(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        check_unchanged(ctx.channels, ctx.generation)
        (input,) = ctx.saved_tensors
        return _active_rows(grad_output, input, ctx.channels, ctx.lookup), None, None, None


def masked_lookup(
    input: Tensor, weight: Tensor, channels: ActiveChannels, lookup: Lookup
) -> Tensor:
    """The same gradients where calls are recorded: the mask counts when the recording runs."""
    output = lookup(input, weight)
    learns = channels.mask_on(weight.device)[input].unsqueeze(-1)
    return torch.where(learns, output, output.detach())


def _active_rows(
    grad_output: Tensor, input: Tensor, channels: ActiveChannels, lookup: Lookup
) -> Tensor:
    """The gradient of the table, from the positions whose token is active."""
    rows, padding = len(channels), lookup.padding_idx
    if padding is None:
        padding = -1
    elif padding < 0:
        padding += rows
    learns = channels.mask_on(input.device)[input]
    if input.is_cpu or lookup.sparse:
        positions = learns.flatten().nonzero().flatten()
        if len(positions) < input.numel():
            input = input.flatten().index_select(0, positions)
            grad_output = grad_output.reshape(-1, grad_output.shape[-1])
            grad_output = grad_output.index_select(0, positions)
    else:
        # Nothing here waits for the device: what is not to be added up takes a frozen row's place,
        # and PyTorch passes over it as over padding.
        if padding >= 0:
            learns = learns & (input != padding)
        padding = int(channels.frozen[0])
        input = torch.where(learns, input, padding)
    gradient: Tensor = torch.ops.aten.embedding_backward(
        grad_output, input, rows, padding, lookup.scale_grad_by_freq, lookup.sparse
    )
    return gradient
