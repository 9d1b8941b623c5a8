"""What the report says of parameters that no neuron owns."""

from __future__ import annotations

import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.following import followers
from tests.support.models import Scaled, freeze


def test_without_follow_they_keep_backprop_alive():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)))
    freeze(model)
    out = model(torch.randn(3, 4))
    assert out.requires_grad
    out.sum().backward()
    assert model[0].scale.grad is not None
    (other,) = neq.conversion_report(model).others
    assert other.name == "0.scale"
    assert "keeps backprop alive" in other.reason


def test_the_report_says_who_follows():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    (other,) = neq.conversion_report(model).others
    assert other.name == "0.scale"
    assert "stops with what lies below it" in other.reason
    (follower,) = followers(model)
    assert follower.parameter is model[0].scale
