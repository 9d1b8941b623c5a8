"""What convert leaves out: base layers of adapters, quantised ones; the warning that it is much."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.controllers import NEqController, StochasticController
from neq_kernels.layers.masked import Masked, Owned
from tests.support.models import converted, entries


def lstm():
    return nn.ModuleDict({"rnn": nn.LSTM(16, 16), "head": nn.Linear(16, 4)})


def test_little_is_said_with_what_costs_most():
    message = (
        r"only 3% of the elements of matrices have neurons; .*: "
        r"LSTM \(recurrent.*\) 97%; see neq\.conversion_report"
    )
    with pytest.warns(UserWarning, match=message):
        neq.convert(lstm())


@pytest.mark.parametrize(
    "convert",
    [
        lambda: neq.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))),
        lambda: neq.convert(lstm(), filter=lambda *_: True),
        lambda: neq.convert(
            nn.ModuleDict({"rnn": lstm()["rnn"].requires_grad_(False), "h": nn.Linear(4, 4)})
        ),
    ],
    ids=["all", "filter", "does not learn"],
)
def test_nothing_is_said_of_much_and_of_what_the_user_left_out(convert):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert()


def test_base_layers_of_adapters_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neq.convert(adapted)
    inner = adapted.base_model.model
    assert converted(inner) == ["0.lora_A.default", "0.lora_B.default", "2"]
    assert entries(inner)["0.base_layer"].reason == "the base layer of an adapter (peft)"
    x = torch.randn(3, 8)
    inner[0].lora_A["default"].channels.set([1])
    adapted(x).sum().backward()


def test_a_quantised_weight_is_left_alone():
    class Quantised(torch.Tensor):
        __module__ = "torchao.dtypes"

    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    model = neq.convert(nn.Sequential(layer, nn.Linear(4, 4)))
    assert type(layer) is nn.Linear
    assert entries(model)["0"].reason == "its weight is quantised (Quantised)"


@neq.register
class Pair(nn.Module):
    """Returns what holds its neurons after something that does not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x.sum(-1), x @ self.weight.T


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return x @ self.weight


class HiddenNeurons(Masked, Hidden):
    owned = (Owned("weight"),)
    output_dim = None


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.pair, self.head = Hidden(), Pair(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.pair(self.hidden(x))[1])


def test_controllers_find_the_neurons_among_outputs_and_leave_hidden_ones_active():
    model = Both()
    model.hidden.__class__ = HiddenNeurons
    model.hidden.adopt(neq.ActiveChannels(3), "exact", neq.nn.Linear(1, 1).anchor)
    neq.convert(model)
    with pytest.warns(UserWarning, match="hidden"):
        controller = NEqController(model, [torch.randn(5, 3)], eps=1.0, warmup=0)
    controller.step()
    controller.step()
    assert model.hidden.channels.n_active == 3
    assert model.pair.channels.n_active == 0
    StochasticController(model, 0.5, warmup=0)
    assert sum(len(m.channels) - m.channels.n_active for m in (model.hidden, model.pair)) > 0
