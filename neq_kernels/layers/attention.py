"""Multi-head attention with neurons that can be frozen."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from neq_kernels import functional
from neq_kernels.autograd.arguments import GradInput
from neq_kernels.autograd.call_state import learns, recorded, transformed
from neq_kernels.autograd.forward import detached
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.layers.anchor import ParameterAnchor
from neq_kernels.layers.base import NeuronLayer, Watcher
from neq_kernels.process_group import in_process_group

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class MultiheadAttention(NeuronLayer, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with neurons that can be frozen: the ``3 * embed_dim``
    features that its inputs are projected to (queries, then keys, then values), and those of its
    ``out_proj``, which is a layer of its own.

    While no parameter learns it is torch's own, fast path included. ``bias_k`` and ``bias_v`` are
    owned by no neuron.
    """

    @classmethod
    def reason_against(cls, layer: nn.Module) -> str | None:
        weights = [layer._parameters.get(name) for name in ("in_proj_weight", *_SEPARATE)]
        for weight in weights:
            if weight is not None and not weight.is_floating_point():
                return f"its in_proj_weight is {weight.dtype}"
        if sum(weight is not None for weight in weights) not in (1, 3):
            return "its in_proj_weight is computed (weight norm, spectral norm, pruning)"
        return None

    @property
    def in_proj_channels(self) -> ActiveChannels:
        """The active features of the input projections: ``[3 * embed_dim]``."""
        return self.channels

    @property
    def n_neurons(self) -> int:
        count: int = 3 * self.embed_dim
        return count

    def adopt(
        self, channels: ActiveChannels, grad_input: GradInput, anchor: ParameterAnchor
    ) -> None:
        super().adopt(channels, grad_input, anchor)
        self._watchers: OrderedDict[int, Watcher] = OrderedDict()

    def release(self) -> None:
        super().release()
        self.__dict__.pop("_watchers", None)

    def channel_dim(self, output: Tensor) -> int:
        return output.dim() - 1

    @classmethod
    def parameters_in(cls, layer: nn.Module) -> list[tuple[Parameter, NeuronLayout]]:
        own = [layer._parameters.get(n) for n in ("in_proj_weight", *_SEPARATE, "in_proj_bias")]
        return [(p, NeuronLayout()) for p in own if p is not None]

    def owners(self) -> list[tuple[Parameter, ActiveChannels, NeuronLayout]]:
        parts = {id(self._parameters[n]): self._part(i, i + 1) for i, n in enumerate(_SEPARATE)}
        owned = self.neuron_parameters()
        return [(p, parts.get(id(p), self.channels), layout) for p, layout in owned]

    def _part(self, start: int, stop: int) -> ActiveChannels:
        """Queries are part 0 of the features, keys part 1, values part 2."""
        return self.channels.part(start * self.embed_dim, stop * self.embed_dim)

    def watch(self, watcher: Watcher) -> RemovableHandle:
        """Give the projected inputs of each call to ``watcher``, ``[N, L, 3 * embed_dim]``; of
        different lengths, they are filled up with zeros."""
        handle = RemovableHandle(self._watchers)
        self._watchers[handle.id] = watcher
        return handle

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if any(isinstance(x, Proxy) for x in (query, key, value)):
            masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return self._traced(query, key, value, *masks)  # type: ignore[return-value]
        if query.is_nested or not (self._watchers or self._learns()):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        batched = F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if not batched:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            query, key, value = _sequence_first(query, key, value)
        padding = _additive(key_padding_mask, "key_padding_mask", query, attn_mask)
        mask = _additive(attn_mask, "attn_mask", query)
        if is_causal and mask is None:
            raise RuntimeError("attn_mask: expected the causal mask with is_causal=True, got None")
        if is_causal and padding is None and not need_weights:
            mask = None
        elif padding is not None:
            is_causal = False
        if mask is not None:
            mask = self._checked(mask, query, key)
        q, k, v = self._in_project(query, key, value)
        out, weights = self._attend(q, k, v, mask, padding, need_weights, is_causal)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(1, 0) if self.batch_first else out, weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What torch.nn.functional.multi_head_attention_forward does with its projected inputs,
        operation by operation: ``[L, N, E]`` and the weights ``[N, heads, L, S]``."""
        length, batch, _ = query.shape
        heads, per_head = self.num_heads, self.head_dim
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.repeat(1, batch, 1)])
            value = torch.cat([value, self.bias_v.repeat(1, batch, 1)])
            mask, padding = _wider(mask), _wider(padding)
        q, k, v = (
            t.view(len(t), batch * heads, per_head).transpose(0, 1) for t in (query, key, value)
        )
        if self.add_zero_attn:
            zero = torch.zeros((batch * heads, 1, per_head), dtype=k.dtype, device=k.device)
            k, v = torch.cat([k, zero], dim=1), torch.cat([v, zero], dim=1)
            mask, padding = _wider(mask), _wider(padding)
        sources = k.size(1)
        if padding is not None:
            padding = padding.view(batch, 1, 1, sources).expand(-1, heads, -1, -1)
            padding = padding.reshape(batch * heads, 1, sources)
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            if mask is not None:
                one = mask.size(0) == 1
                mask = mask.unsqueeze(0) if one else mask.view(batch, heads, -1, sources)
            q = q.view(batch, heads, length, per_head)
            k, v = (t.view(batch, heads, sources, per_head) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
            mixed = mixed.permute(2, 0, 1, 3).reshape(length, batch, self.embed_dim)
            return self.out_proj(mixed), None
        scaled = q * math.sqrt(1.0 / float(per_head))
        if mask is None:
            scores = torch.bmm(scaled, k.transpose(-2, -1))
        else:
            scores = torch.baddbmm(mask, scaled, k.transpose(-2, -1))
        weights = F.softmax(scores, dim=-1)
        if dropout > 0.0:
            weights = F.dropout(weights, p=dropout)
        mixed = torch.bmm(weights, v).transpose(0, 1).contiguous()
        mixed = mixed.view(length, batch, self.embed_dim)
        return self.out_proj(mixed), weights.view(batch, heads, length, sources)

    def _in_project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, by one product where they come from one tensor."""
        e = self.embed_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return self._watched_whole(self._project(query, weight, bias, self.channels))
        sizes = [e, 2 * e] if weight is not None and key is value else [e, e, e]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        if weight is None:
            weights = tuple(getattr(self, name) for name in _SEPARATE)
        else:
            weights = weight.split(sizes)
        q = self._project(query, weights[0], biases[0], self._part(0, 1))
        if len(sizes) == 2:
            k, v = _apart(self._project(key, weights[1], biases[1], self._part(1, 3)), 2)
        else:
            k = self._project(key, weights[1], biases[1], self._part(1, 2))
            v = self._project(value, weights[2], biases[2], self._part(2, 3))
        return self._watched_parts(q, k, v)

    def _project(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, channels: ActiveChannels
    ) -> Tensor:
        if torch.compiler.is_compiling() and self._stops():
            weight, bias = weight.detach(), detached(bias)
        if not torch.compiler.is_compiling():
            channels.called = True
        constant = channels.none_active and not (
            input.requires_grad or recorded(weight) or transformed()
        )
        # Not of detached weights: PyTorch would project an input that is batch-first by many small
        # products.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            out = functional.linear(input, weight, bias, channels, grad_input=self.grad_input)
        return self._anchored(out)

    def _anchored(self, output: Tensor) -> Tensor:
        if in_process_group() and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.anchor.add(p for p, channels, _ in self.owners() if channels.none_active)
        return super()._anchored(output)

    def _learns(self) -> bool:
        own = self._parameters
        return (
            learns(own["in_proj_weight"], own["in_proj_bias"])
            or learns(own["q_proj_weight"], own["k_proj_weight"])
            or learns(own["v_proj_weight"], self.out_proj.weight)
            or learns(self.out_proj.bias, self.bias_k)
        )

    def _watched_whole(self, projected: Tensor) -> tuple[Tensor, ...]:
        for watcher in self._watchers.values():
            replacement = watcher(projected.transpose(0, 1))
            projected = projected if replacement is None else replacement.transpose(0, 1)
        return _apart(projected, 3)

    def _watched_parts(self, *parts: Tensor) -> tuple[Tensor, ...]:
        for watcher in self._watchers.values():
            longest = max(map(len, parts))
            padded = [F.pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in parts]
            replacement = watcher(torch.cat(padded, dim=-1).transpose(0, 1))
            if replacement is not None:
                replaced = _apart(replacement.transpose(0, 1), 3)
                parts = tuple(new[: len(old)] for new, old in zip(replaced, parts, strict=True))
        return parts

    def _checked(self, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
        length, batch, sources = len(query), query.shape[1], len(key)
        two, three = (length, sources), (batch * self.num_heads, length, sources)
        if tuple(mask.shape) not in (two, three):
            raise RuntimeError(
                f"attn_mask: expected shape {two} or {three}, got {tuple(mask.shape)}"
            )
        return mask.unsqueeze(0) if mask.dim() == 2 else mask


def _sequence_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each transposed; those that are one tensor stay one."""
    q = query.transpose(1, 0)
    k = q if key is query else key.transpose(1, 0)
    return q, k, k if value is key else value.transpose(1, 0)


def _apart(projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """``[..., parts * E]`` as contiguous parts, as F.multi_head_attention_forward cuts it."""
    apart = projected.unflatten(-1, (parts, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2)
    return tuple(apart.contiguous().unbind(0))


def _additive(
    mask: Tensor | None, name: str, query: Tensor, other: Tensor | None = None
) -> Tensor | None:
    return F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=F._none_or_dtype(other),
        other_name="attn_mask" if name == "key_padding_mask" else "",
        target_type=query.dtype,
        check_other=name == "key_padding_mask",
    )


def _wider(mask: Tensor | None) -> Tensor | None:
    """With one more source, which everything may attend to."""
    return None if mask is None else F.pad(mask, (0, 1))
