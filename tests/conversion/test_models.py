"""Whole models: outputs as before, gradients of frozen neurons zero."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.segmentation import DeepLabV3

import neq_kernels as neq
from neq_kernels.layers.traversal import neuron_owners
from tests.support.models import (
    assert_model_gradients,
    output_of,
    set_ragged,
    tiny_convnext,
    tiny_swin,
    tiny_vit,
)


def tiny_deeplab():
    """ResNet-18 with dilations in place of strides, DeepLab's own heads, an auxiliary one too."""
    backbone = torchvision.models.resnet18()
    stages = nn.Sequential(*list(backbone.children())[:6])
    head = torchvision.models.segmentation.deeplabv3.DeepLabHead(128, 5, (2, 3))
    features = torchvision.models._utils.IntermediateLayerGetter(stages, {"4": "aux", "5": "out"})
    aux = torchvision.models.segmentation.fcn.FCNHead(64, 5)
    return DeepLabV3(features, head, aux)


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), 32),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 32),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 32),
    "convnext": (tiny_convnext, 32),
    "vit": (tiny_vit, 16),
    "swin": (tiny_swin, 36),
    "deeplab": (tiny_deeplab, 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_they_did_and_mask_their_gradients(name):
    make, size = MODELS[name]
    plain = make().double()
    ours = neq.convert(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict())
    set_ragged(ours)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    outs = [output_of(model, x) for model in (plain, ours)]
    assert torch.equal(*outs)
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)
    assert_model_gradients(ours, plain)
    neq.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "deeplab"])
def test_every_parameter_of_a_convolutional_net_is_owned(name):
    make, size = MODELS[name]
    model = neq.convert(make())
    assert set(neuron_owners(model)) == set(model.parameters())
    assert neq.conversion_report(model).others == ()
    assert neq.verify(model, torch.randn(2, 3, size, size)) == []
