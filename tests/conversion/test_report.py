"""What the report says of parameters that no neuron owns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.following import followers
from tests.support.models import Scaled, entries, freeze


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("others", ["train", "follow"])
def test_recurrent_layers_are_reported_with_what_they_keep_alive(kind, others):
    with pytest.warns(
        UserWarning, match=f"of the elements of matrices have neurons.*{kind.__name__}"
    ):
        model = neq.convert(nn.ModuleList([nn.Linear(4, 4), kind(4, 4)]), others=others)
    entry = entries(model)["1"]
    assert entry.kind == kind.__name__
    assert not entry.converted
    assert "recurrent" in entry.reason
    assert "keeps backprop alive" in entry.reason
    listed = {e.name: e.reason for e in neq.conversion_report(model).others}
    assert set(listed) == {f"1.{name}" for name, _ in model[1].named_parameters()}
    words = "keeps backprop alive" if others == "train" else "stops with what lies below it"
    assert all(words in reason for reason in listed.values())


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
