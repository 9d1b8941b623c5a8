"""neq.explain: what it says of models small enough to be worked out by hand."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq_kernels as neq
from neq_kernels.measure import flops

N = 3
ONE = 4 * 4  # MACs of a layer for one row


class Block(nn.Module):
    """A scale that no neuron owns, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x * self.scale).relu()


def chain(n: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(n)))


def explained(model, *frozen: str, x=None):
    neq.convert(model)
    for name in frozen:
        model.get_submodule(name).channels.set([])
    return neq.explain(model, torch.randn(N, 4) if x is None else x)


def test_everything_active():
    e = explained(chain(3))
    assert (e.macs, e.converted, e.unowned, e.frozen) == (3 * ONE, 1, (), 0)
    assert e.backprop == e.following
    assert (e.backprop.stops_after, e.backprop.stopped) == (None, 0)
    assert (e.backprop.lowest, e.backprop.kept_alive_by) == ("0.weight", ())
    assert e.backprop.bound == 1
    assert e.activation_bytes == e.dense_activation_bytes
    assert e.frozen_bytes == 0
    assert "runs down to 0.weight" in str(e)


def test_a_stopped_prefix():
    e = explained(chain(4), "0", "1")
    assert (e.frozen, e.backprop.stops_after, e.backprop.stopped) == (0.5, "1", 2)
    assert (e.backprop.lowest, e.backprop.kept_alive_macs) == ("2.weight", 0)
    # Dense: 4 forwards, 4 wgrads, 3 dgrads. Now two wgrads and the dgrads of 1 and 2 are gone.
    assert e.backprop.bound == pytest.approx(11 / 7)
    # What layers 0 to 3 read, less what 0 and 1 do.
    assert e.dense_activation_bytes - e.activation_bytes == 2 * N * 4 * 4
    assert e.frozen_bytes == 2 * (16 + 4) * 4
    assert "stops after 1 (2 layers)" in str(e)
    assert "bound on the step  1.57x, by FLOPs (not measured)" in str(e)


def test_frozen_layers_above_a_live_one_stop_nothing():
    e = explained(chain(3), "1", "2")
    assert (e.backprop.stops_after, e.backprop.lowest) == (None, "0.weight")
    assert e.backprop.bound == pytest.approx(8 / 6)
    assert e.backprop.kept_alive_by == ()


def test_what_keeps_backprop_alive_is_named_and_what_follow_would_add():
    model = nn.Sequential(nn.Linear(4, 4), Block(), Block(), nn.Linear(4, 4))
    e = explained(model, "0", "1.layer", "2.layer")
    now, following = e.backprop, e.following
    assert (now.stops_after, now.stopped, now.lowest) == ("0", 1, "1.scale")
    assert now.kept_alive_by == ("1.scale", "2.scale")
    assert now.kept_alive_macs == 3 * ONE  # through 1.layer, 2.layer and the last one
    assert (following.stops_after, following.stopped) == ("2.layer", 3)
    assert (following.kept_alive_by, following.kept_alive_macs) == ((), 0)
    assert following.bound == pytest.approx(11 / 5)
    assert now.bound == pytest.approx(11 / 8)
    lines = str(e).splitlines()
    assert "  kept alive by    *.scale (2)" in lines
    assert 'others="follow"    bound 2.20x, backprop stops after 2.layer (3 layers)' in lines


def test_the_graph_decides_and_not_where_a_parameter_is_registered():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x) * self.late) + self.early

    e = explained(Last(), "first")
    assert e.backprop.lowest == "late"
    assert e.backprop.kept_alive_by == ("late",)
    assert e.backprop.kept_alive_macs == ONE


def test_an_embedding_keeps_backprop_alive():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(5, 4), chain(2)

        def forward(self, ids):
            return self.body(self.embed(ids))

    model = neq.convert(Tokens(), filter=lambda name, _: name.startswith("body"))
    model.body[0].channels.set([])
    e = neq.explain(model, torch.zeros(N, 2, dtype=torch.long))
    assert (e.macs, e.backprop.kept_alive_by) == (2 * 2 * ONE, ("embed.weight",))
    assert e.backprop.kept_alive_macs == 2 * 2 * ONE


def test_what_is_outside_neurons_is_named_with_the_reason():
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.rnn, self.head = nn.RNN(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x):
            for layer in self.layers:
                x = F.linear(x, layer.weight)
            return self.head(self.rnn(x)[0])

    e = explained(Outside(), x=torch.randn(1, 2, 4))
    assert e.converted == pytest.approx(1 / 6)
    lines = [line.strip() for line in str(e).splitlines()[1:4]]
    assert lines == [
        "outside          layers.*.weight (3): 50.0% (its layer is not called)",
        "rnn.weight_ih_l*: 16.7% (recurrent, no neuron owns it)",
        "rnn.weight_hh_l*: 16.7% (recurrent, no neuron owns it)",
    ]


def test_wholly_frozen_and_what_cannot_learn():
    e = explained(chain(2), "0", "1")
    assert (e.frozen, e.backprop.lowest, e.backprop.stops_after) == (1, None, "1")
    assert e.activation_bytes == 0
    model = neq.convert(chain(2))
    model[0].requires_grad_(False)
    e = neq.explain(model, torch.randn(N, 4))
    assert (e.frozen, e.backprop.stops_after, e.backprop.bound) == (0, "0", 1)


def test_the_model_is_left_as_found():
    model = neq.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Block()))
    model[2].layer = neq.convert(nn.Linear(4, 4))
    model.train()
    model[0].channels.set([1])
    generation = model[0].channels.generation
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e = neq.explain(torch.compile(model), torch.randn(2, 3, 6, 6))
    assert model[0].channels.generation == generation
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any("neq_following" in module.__dict__ for module in model.modules())
    saved = json.loads(json.dumps(e.to_dict()))
    assert saved["backprop"]["lowest"] == "0.weight"


def test_it_agrees_with_the_count():
    model = neq.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)))
    x = torch.randn(2, 3, 6, 6)
    dense = flops.count(model, x)
    model[0].channels.set([0])
    now = flops.count(model, x)
    e = neq.explain(model, x)
    assert e.macs == now.macs
    assert e.frozen == flops.frozen_fraction(model, now)
    assert e.backprop.bound == pytest.approx(dense.executed / now.executed)


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (nn.Linear(4, 4), torch.ones(1, 4), ValueError, "call convert"),
        (neq.convert(nn.Linear(4, 4)), 3, TypeError, "example: expected a tensor"),
    ],
)
def test_mistakes(model, example, error, message):
    with pytest.raises(error, match=message):
        neq.explain(model, example)
