"""timm's own layers have neurons, and compute what they did."""

from __future__ import annotations

import pytest
import timm
import torch
from timm import layers
from timm.layers import evo_norm, filter_response_norm, norm, norm_act, std_conv
from timm.layers.linear import Linear
from timm.layers.split_batchnorm import SplitBatchNorm2d
from timm.models.metaformer import GroupNorm1NoBias, LayerNorm2dNoBias, LayerNormNoBias
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.masked import Masked
from tests.support.third_party import assert_holds

PICTURE, ROWS = (2, 6, 5, 7), (2, 5, 6)

LAYERS = {
    "Linear": (lambda: Linear(6, 5), ROWS),
    "Conv2dSame": (lambda: layers.Conv2dSame(6, 4, 3, stride=2), PICTURE),
    "StdConv2d": (lambda: std_conv.StdConv2d(6, 4, 3, bias=True), PICTURE),
    "StdConv2dSame": (lambda: std_conv.StdConv2dSame(6, 4, 3), PICTURE),
    "ScaledStdConv2d": (lambda: std_conv.ScaledStdConv2d(6, 4, 3, groups=2), PICTURE),
    "ScaledStdConv2dSame": (lambda: std_conv.ScaledStdConv2dSame(6, 4, 3, stride=2), PICTURE),
    "BatchNormAct2d": (lambda: norm_act.BatchNormAct2d(6), PICTURE),
    "SplitBatchNorm2d": (lambda: SplitBatchNorm2d(6, num_splits=2), PICTURE),
    "GroupNorm": (lambda: norm.GroupNorm(6, 2), PICTURE),
    "GroupNorm1": (lambda: norm.GroupNorm1(6), PICTURE),
    "GroupNorm1NoBias": (lambda: GroupNorm1NoBias(6), PICTURE),
    "GroupNormAct": (lambda: norm_act.GroupNormAct(6, 2), PICTURE),
    "LayerNorm": (lambda: norm.LayerNorm(6), ROWS),
    "LayerNormNoBias": (lambda: LayerNormNoBias(6), ROWS),
    "LayerNormFp32": (lambda: norm.LayerNormFp32(6), ROWS),
    "LayerNorm2d": (lambda: norm.LayerNorm2d(6), PICTURE),
    "LayerNorm2dNoBias": (lambda: LayerNorm2dNoBias(6), PICTURE),
    "LayerNormExp2d": (lambda: norm.LayerNormExp2d(6), PICTURE),
    "LayerNormAct": (lambda: norm_act.LayerNormAct(6), ROWS),
    "LayerNormAct2d": (lambda: norm_act.LayerNormAct2d(6), PICTURE),
    "RmsNorm": (lambda: norm.RmsNorm(6), ROWS),
    "RmsNorm2d": (lambda: norm.RmsNorm2d(6), PICTURE),
    "SimpleNorm": (lambda: norm.SimpleNorm(6), ROWS),
    "SimpleNorm2d": (lambda: norm.SimpleNorm2d(6), PICTURE),
    "RmsNormAct2d": (lambda: norm_act.RmsNormAct2d(6), PICTURE),
    "EvoNorm2dB0": (lambda: evo_norm.EvoNorm2dB0(6), PICTURE),
    "EvoNorm2dS0": (lambda: evo_norm.EvoNorm2dS0(6, groups=2), PICTURE),
    "FilterResponseNormTlu2d": (
        lambda: filter_response_norm.FilterResponseNormTlu2d(6),
        PICTURE,
    ),
}
REAL_KERNELS = {"Linear", "Conv2dSame", "LayerNormNoBias"}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = make().double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)
    x = torch.randn(shape, dtype=torch.float64)
    if "Fp32" in name:
        plain, x = plain.float(), x.float()
    kind = type(plain)
    layer = assert_holds(plain, x)
    assert type(layer) is kind
    neq.convert(layer)
    assert layer.channel_dim(layer(x)) == (len(shape) - 1 if shape is ROWS else 1)
    assert isinstance(layer, Masked) != (name in REAL_KERNELS)


def test_sync_batch_norm_act():
    model = nn.Sequential(norm_act.BatchNormAct2d(6))
    synchronised = timm.layers.convert_sync_batchnorm(model)
    neq.convert(synchronised)
    assert type(synchronised[0]).__name__ == "SyncBatchNormAct"
    assert isinstance(synchronised[0], NeuronLayer)


def test_every_product_of_a_normalizer_free_net_has_neurons():
    model = neq.convert(timm.create_model("nf_regnet_b0", num_classes=3))
    assert all(e.converted for e in neq.conversion_report(model).modules)
    model = neq.convert(timm.create_model("tf_efficientnetv2_b0", num_classes=3))
    assert all(e.converted for e in neq.conversion_report(model).modules)
