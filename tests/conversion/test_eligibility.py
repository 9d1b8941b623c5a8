"""Which layers are converted, and the reasons of the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import neq_kernels as neq
from tests.support.models import OwnLinear, converted, entries


def with_channels():
    layer = nn.Linear(3, 4)
    layer.channels = 4
    return layer


LEFT_ALONE = {
    "a subclass of Linear": lambda: OwnLinear(3, 4),
    "its weight is computed": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
    "its weight is computed by weight norm of columns": lambda: weight_norm(nn.Linear(3, 4), dim=1),
    "parametrized": lambda: parametrizations.weight_norm(nn.Bilinear(3, 3, 4)),
    "its weight is computed by spectral norm": lambda: spectral_norm(nn.Linear(3, 4)),
    "it normalises over more than one dimension": lambda: nn.LayerNorm([3, 4]),
    "its weight is torch.complex64": lambda: nn.Linear(3, 4, dtype=torch.complex64),
    "its weight is empty": lambda: nn.Linear(0, 4),
    "it has an attribute of its own that neurons would take: channels": with_channels,
    "recurrent": lambda: nn.LSTM(3, 4),
    "max_norm": lambda: nn.Embedding(3, 4, max_norm=1.0),
    "it adds up its rows in one operator": lambda: nn.EmbeddingBag(3, 4),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_what_is_left_alone_says_why(reason):
    odd = LEFT_ALONE[reason]()
    model = nn.Sequential(odd, nn.Linear(4, 2))
    kind = type(odd)
    neq.convert(model)
    assert type(odd) is kind
    assert converted(model) == ["1"]
    entry = entries(model)["0"]
    assert not entry.converted
    assert entry.reason.startswith(reason.split(" by ")[0].split(":")[0])
    assert entry.name in str(neq.conversion_report(model))


def test_layers_without_parameters_are_not_mentioned():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4, affine=False)))
    assert list(entries(model)) == ["0"]
    assert converted(model) == ["0"]


def test_lazy_layers_are_left_alone_until_they_are_ready():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    neq.convert(model)
    assert converted(model) == ["1"]
    model(torch.randn(2, 3))
    neq.convert(model)
    assert converted(model) == ["0", "1"]


def test_filter_and_norms():
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))

    model = neq.convert(net(), filter=lambda name, _: name != "2")
    assert converted(model) == ["0", "1"]
    assert entries(model)["2"].reason
    seen = []
    neq.convert(net(), filter=lambda name, module: bool(seen.append((name, type(module))) or 1))
    assert seen == [("0", nn.Conv2d), ("1", nn.BatchNorm2d), ("2", nn.Conv2d)]
    model = neq.convert(net(), norms=False)
    assert converted(model) == ["0", "2"]
    assert type(model[1]) is nn.BatchNorm2d


def test_a_weight_tied_to_a_layer_that_stays_dense_stays_dense():
    table = nn.Embedding(7, 4, max_norm=1.0)
    model = nn.ModuleDict({"embed": table, "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    model["other"] = nn.Linear(4, 4)
    neq.convert(model)
    assert converted(model) == ["other"]
    assert entries(model)["head"].reason == "its weight is shared with embed"


def test_a_weight_in_which_layers_see_different_neurons_stays_dense():
    """A convolution's output channels are its transpose's input channels."""
    for groups in (1, 2):
        model = nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=groups),
            nn.ConvTranspose2d(4, 4, 3, groups=groups),
            nn.Conv2d(4, 4, 1),
        )
        model[1].weight = model[0].weight
        neq.convert(model)
        assert converted(model) == ["2"]
        for name in "01":
            assert "sees other neurons" in entries(model)[name].reason
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="sees other neurons"):
        neq.convert(model)


def test_layers_that_see_the_same_neurons_may_differ_otherwise():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(2, 4, 3, dilation=2))
    model[1].weight = model[0].weight
    neq.convert(model)
    assert model[0].channels is model[1].channels
