"""What the source of a module's forward says about the weights that it reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import swin_transformer

import neq_kernels as neq
from neq_kernels.conversion.weight_readers import arguments_read, layers_read


class Base(nn.Module):
    def forward(self, x):
        return F.linear(x, self.base.weight)

    def unused(self):
        return self.never.weight


class Reads(Base):
    def forward(this, x):
        if this.dtype_only.weight.dtype == x.dtype and this.compared.weight is not None:
            x = this.helper(x)
        isinstance(this.asked.weight, nn.Parameter)
        this.stored.weight.data.zero_()
        own = this.weight
        return super().forward(x) @ this.inner.deep.weight + own + this.scale

    def helper(self, x):
        return self.further(F.linear(x, weight=self.blocks.first.weight))

    def further(self, x):
        return torch.cat((x, self.tables.bias))

    @property
    def scale(self):
        return self.scaled.weight


def test_weights_read_in_forward_and_what_it_calls_are_found():
    assert set(layers_read(Reads)) == {"base", "inner.deep", "blocks.first", "tables", "scaled"}
    assert layers_read(nn.Linear) == ()
    assert layers_read(nn.Sequential) == ()


def test_arguments_whose_weight_forward_reads_are_found():
    class Handed(nn.Module):
        def forward(self, x, layer, *, other=None, unread=None):
            if unread.weight.dtype == x.dtype:
                x = x + other.bias
            return x @ layer.weight

    assert arguments_read(Handed) == {"layer": 1, "other": 2}
    assert arguments_read(Reads) == {}


def test_a_class_without_source_reads_nothing():
    made = {}
    exec("def forward(self, x):\n    return x @ self.linear.weight", made)
    assert layers_read(type("Made", (nn.Module,), {"forward": made["forward"]})) == ()


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        (swin_transformer.ShiftedWindowAttention, {"qkv", "proj"}),
        (swin_transformer.ShiftedWindowAttentionV2, {"qkv", "proj"}),
        (nn.MultiheadAttention, {"out_proj"}),
        (nn.LinearCrossEntropyLoss, {"linear"}),
    ],
)
def test_known_readers(kind, layers):
    assert set(layers_read(kind)) == layers


def test_torchs_encoder_keeps_its_fast_path():
    """It reads weights only where nothing learns, and would not with a hook in its way."""
    layer = neq.convert(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())
    assert not any(module._forward_pre_hooks for module in layer.modules())
