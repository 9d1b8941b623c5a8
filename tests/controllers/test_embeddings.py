"""Embeddings and controllers: left alone unless asked for; φ of a token is that of its row."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import neq_kernels as neq
from neq_kernels.controllers import FixedController, NEqController, StochasticController
from tests.support.nets import masks, wiggle

TOKENS = [torch.tensor([[0, 1, 2], [2, 3, 3]]), torch.tensor([[1, 1, 4]])]
MEMORIES = ["snapshot", "activations"]


class Reader(nn.Module):
    """Tokens in, tokens out; the head is tied or not."""

    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        if tied:
            self.head.weight = self.table.weight
        neq.convert(self)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.table(x))))


CONTROLLERS = {
    "neq": lambda model, **options: NEqController(model, TOKENS, eps=9, **options),
    "stochastic": lambda model, **options: StochasticController(model, 0.5, **options),
}
every_controller = pytest.mark.parametrize("make", CONTROLLERS.values(), ids=CONTROLLERS)


@every_controller
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads_tied_to_them_are_left_alone(make, tied):
    model = Reader(tied)
    model.table.channels.set([2, 7])
    controller = make(model, include_output=True)
    for _ in range(2):
        controller.step()
    assert model.table.channels.active.tolist() == [2, 7]
    assert not all(masks(model)["mix"])
    assert all(masks(model)["head"]) is False
    names = {"mix"} if tied else {"mix", "head"}
    assert controller.history[-1]["layers"].keys() == names


@every_controller
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_were_asked_for(make, tied):
    model = Reader(tied)
    controller = make(model, include_output=True, embeddings=True)
    controller.step()
    assert model.table.channels.n_active < 9
    layers = controller.history[-1]["layers"]
    assert layers.keys() == {"table", "mix", "head"}
    assert layers["table"]["elements"] == 36
    assert layers["table"]["active_elements"] == 4 * model.table.channels.n_active
    model = Reader(tied)
    make(model, embeddings=True).step()
    # The head is the output layer; what is tied to it shares its fate.
    assert all(masks(model)["head"])
    assert all(masks(model)["table"]) is tied


def test_fixed_reaches_them():
    model = Reader(tied=True)
    FixedController(model, {"table": [8]})
    assert masks(model)["head"] == masks(model)["table"] == [False] * 8 + [True]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("similarity", ["neuron", "sample"])
def test_phi_of_a_token_is_the_cosine_of_its_row(memory, similarity):
    """Of token 8 too, which the probe does not hold."""
    model = Reader()
    options = {"memory": memory, "similarity": similarity, "embeddings": True}
    controller = NEqController(model, TOKENS, eps=1e-3, **options)
    with torch.no_grad():
        model.table.weight[8] = torch.tensor([3.0, 0.0, 0.0, 0.0])
        model.table.weight[1] = torch.tensor([1.0, 1.0, 0.0, 0.0])
        model.table.weight[5] = 0
    controller.step()
    before = model.table.weight.detach().clone()
    with torch.no_grad():
        model.table.weight[8] = torch.tensor([3.0, 4.0, 0.0, 0.0])
        model.table.weight[1] *= 2
    controller.step()
    phi = controller.response.phi["table"]
    expected = torch.cosine_similarity(model.table.weight.detach(), before, dim=1).double()
    expected[5] = 1  # two rows of zeros are alike
    torch.testing.assert_close(phi, expected)
    assert phi[8] == pytest.approx(0.6)
    assert phi[0] == 1
    velocity = controller.response.velocity["table"]
    assert masks(model)["table"] == (velocity.abs() > 1e-3).tolist()
    assert [masks(model)["table"][token] for token in (0, 8)] == [False, True]


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_resumed_run_is_the_same_run(memory):
    def start(model):
        return NEqController(model, TOKENS, eps=0.01, memory=memory, embeddings=True)

    model = Reader()
    controller = start(model)
    wiggle(model, seed=1)
    controller.step()
    file = io.BytesIO()
    torch.save(controller.state_dict(), file)
    again = copy.deepcopy(model)
    resumed = start(again)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    for net, its in ((model, controller), (again, resumed)):
        wiggle(net, seed=2)
        with pytest.warns(UserWarning, match="frozen neurons moved"):
            its.step()
    assert masks(again) == masks(model)
    phi = (its.response.phi["table"] for its in (controller, resumed))
    assert torch.equal(*phi)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_state_without_embeddings_is_taken_up(memory):
    """Saved with embeddings=False: their φ starts from the first epoch that knows them."""
    model = Reader()
    state = NEqController(model, TOKENS, memory=memory).state_dict()
    controller = NEqController(model, TOKENS, memory=memory, embeddings=True)
    controller.load_state_dict(state)
    assert all(masks(model)["table"])
    if memory == "activations":
        with pytest.warns(UserWarning, match=r"stay active: \['table'\]"):
            controller.step()
        assert all(masks(model)["table"])
    for _ in range(2):
        controller.step()
    assert not any(masks(model)["table"])


def test_only_embeddings():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, x):
            return self.table(x).sum(1)

    model = neq.convert(Bag())
    with pytest.raises(ValueError, match="run converted layers that learn"):
        NEqController(model, TOKENS, include_output=True)
    controller = NEqController(model, TOKENS, embeddings=True, include_output=True)
    controller.step()
    assert model.table.channels.n_active == 1, "one stays active in the model"
    StochasticController(model, 1.0, include_output=True, embeddings=True, warmup=0)
    assert model.table.channels.n_active == 1


@pytest.mark.parametrize("memory", MEMORIES)
def test_neurons_that_no_output_shows_stay_active(memory):
    """Those of a mixture's experts."""
    config = MixtralConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = neq.convert(MixtralForCausalLM(config))
    with pytest.warns(UserWarning, match="show their neurons in no output.*experts"):
        controller = NEqController(model, TOKENS[:1], eps=9, memory=memory)
    controller.step()
    found = {name.split(".")[-1]: any(mask) for name, mask in masks(model).items()}
    assert found["experts"]
    assert found["down_proj_neurons"]
    assert not found["q_proj"]


def test_an_embedding_registered_last_is_no_output_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    assert StochasticController(neq.convert(model), 0.5).outputs == ["0"]


@every_controller
def test_what_is_no_bool(make):
    with pytest.raises(TypeError, match="embeddings: expected a bool, got str"):
        make(Reader(), embeddings="table")
