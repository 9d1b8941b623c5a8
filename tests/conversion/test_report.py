"""What the report says of parameters that no neuron owns."""

from __future__ import annotations

import copy

import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.following import followers
from tests.support.models import Scaled, assert_model_gradients, converted, entries, freeze


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_multi_head_attention_is_reported_and_dense():
    plain = Attentive().double()
    ours = neq.convert(copy.deepcopy(plain))
    assert converted(ours) == ["head"]
    inside = "attention."
    names = [
        inside + n for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    assert "MultiheadAttention uses its weight" in entries(ours)["attention.out_proj"].reason
    assert [e.name for e in neq.conversion_report(ours).others] == names
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert neq.verify(ours, x) == names
    ours.head.channels.set([1])
    for model in (plain, ours):
        model(x).square().sum().backward()
    assert_model_gradients(ours, plain)


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
