"""Who decides when a parameter that no neuron owns stops."""

from __future__ import annotations

import copy
import warnings
from itertools import combinations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.following import followers
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support.wiring import WIRINGS, Wired


def stops(model, frozen, forward):
    """Whether ``p`` gets no gradient while the layers of these names are wholly frozen."""
    model.zero_grad()
    for name in "abcd":
        layer = getattr(model, name)
        layer.channels.set([] if name in frozen else [0, 1, 2])
    out = forward()
    if out.requires_grad:
        out.square().sum().backward()
    return model.p.grad is None


@pytest.mark.parametrize("name", [n for n in WIRINGS if n not in ("thrown away", "not used")])
def test_a_parameter_stops_with_what_lies_below_it(name):
    wiring, uses = WIRINGS[name]
    model = neq.convert(Wired(wiring), others="follow")
    x = torch.randn(4, 3)
    model(x)
    for n_frozen in range(5):
        for frozen in map(set, combinations("abcd", n_frozen)):
            expected = all(use is not None and frozen.issuperset(use) for use in uses)
            assert stops(model, frozen, lambda: model(x)) == expected, frozen


def test_before_the_first_forward_all_layers_but_the_last_decide():
    for frozen, expected in (("a", False), ("abc", True)):
        model = neq.convert(Wired(WIRINGS["stem"][0]), others="follow")
        assert stops(model, frozen, lambda model=model: model(torch.randn(4, 3))) == expected
    # The same forward has shown more.
    assert not followers(model)[0].channels.n_active
    model = neq.convert(Wired(WIRINGS["stem"][0]), others="follow")
    assert not stops(model, "a", lambda: model(torch.randn(4, 3)))
    assert stops(model, "a", lambda: model(torch.randn(4, 3)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [False, True])
def test_any_forward_shows_it(mode, training):
    model = neq.convert(Wired(WIRINGS["stem"][0]), others="follow").train(training)
    with mode():
        model(torch.randn(4, 3))
    assert stops(model.train(), "a", lambda: model(torch.randn(4, 3)))


def test_both_modes_are_recorded():
    """A head that runs in training alone."""

    def wiring(m, x):
        x = m.b(m.a(x) * m.p)
        return x + m.c(x * m.p) if m.training else x

    model = neq.convert(Wired(wiring), others="follow").eval()
    x = torch.randn(4, 3)
    model(x)
    model.train()(x)
    assert not stops(model, "ab", lambda: model(x))
    assert stops(model, "abc", lambda: model(x))


def test_a_layer_that_is_skipped_at_random_is_met():
    calls = iter([False, False, True, True, True, True])

    def wiring(m, x):
        x = x * m.p
        if next(calls):
            x = m.a(x)
        return m.b(x)

    model = neq.convert(Wired(wiring), others="follow")
    x = torch.randn(4, 3)
    for _ in range(3):
        model(x)
    assert not stops(model, "b", lambda: model(x))
    assert not stops(model, "a", lambda: model(x))
    assert stops(model, "ab", lambda: model(x))


def test_a_replica_shows_nothing():
    """Those of DataParallel run in threads of their own."""
    model = neq.convert(Wired(WIRINGS["below the head"][0]), others="follow")
    x = torch.randn(4, 3)
    replica = model._replicate_for_data_parallel()
    replica.p = model.p * 1
    assert torch.equal(replica(x), model(x))
    assert not stops(model, "abc", lambda: model(x))
    model.zero_grad()
    replica(x).sum().backward()
    assert model.p.grad is not None  # the replica's own tensor is what it reads


def test_a_forward_that_raises_shows_nothing():
    fails = [True]

    def wiring(m, x):
        x = m.a(x * m.p)
        if fails.pop() if fails else False:
            raise ArithmeticError
        return m.b(x)

    model = neq.convert(Wired(wiring), others="follow")
    x = torch.randn(4, 3)
    with pytest.raises(ArithmeticError):
        model(x)
    model(x)
    assert stops(model, "a", lambda: model(x))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential])
def test_what_was_recorded_goes_along_with_a_copy(wrap):
    model = neq.convert(wrap(Wired(WIRINGS["stem"][0])), others="follow")
    x = torch.randn(4, 3)
    model(x)
    twin = copy.deepcopy(model)
    inner = twin[0] if isinstance(twin, nn.Sequential) else twin
    assert stops(inner, "a", lambda: twin(x))


def test_a_tied_table_stops_with_its_last_use():
    """As long as no neuron owns it."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.body(self.table(ids)))

    model = neq.convert(Tied(), others="follow", filter=lambda name, _: name == "body")
    ids = torch.tensor([1, 2])
    for _ in range(2):
        model.zero_grad()
        model.body.channels.set([])
        model(ids).sum().backward()
    assert model.table.weight.grad is not None
    assert len(followers(model)) == 2  # and the bias of the head


def test_converting_again_keeps_what_was_recorded():
    model = neq.convert(Wired(WIRINGS["stem"][0]), others="follow")
    x = torch.randn(4, 3)
    model(x)
    neq.convert(model)
    assert stops(model, "a", lambda: model(x))


def test_converting_again_takes_new_layers_into_account():
    model = neq.convert(nn.Sequential(Wired(WIRINGS["end"][0])), others="follow")
    x = torch.randn(4, 3)
    model(x)
    model.append(nn.Linear(3, 2))
    neq.convert(model)
    model(x)
    assert not stops(model[0], "ab", lambda: model(x))
    model[1].channels.set([])
    assert stops(model[0], "ab", lambda: model(x))


def test_the_model_inside_a_module_that_adds_nothing():
    """A training wrapper whose own forward is never run."""

    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Wired(WIRINGS["stem"][0])

    task = neq.convert(Task(), others="follow")
    x = torch.randn(4, 3)
    task.net(x)
    assert stops(task.net, "a", lambda: task.net(x))


def test_t5_stops_with_its_position_table():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    size = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**size, num_layers=2, tie_word_embeddings=False))
    neq.convert(model, others="follow")
    ids = torch.randint(0, 20, (2, 4))
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    model(**batch)
    for name, layer in named_neuron_layers(model):
        if name.startswith("encoder") or name == "shared":
            layer.channels.set([])
    model(**batch).logits.sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith("encoder.block") for name in learning)


def test_what_follows_is_not_counted_as_neurons():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    torch.manual_seed(0)
    plain = Recurrent()
    x = torch.randn(5, 3)
    with warnings.catch_warnings(action="ignore"):
        models = [neq.convert(copy.deepcopy(plain), others=o) for o in ("train", "follow")]
    train, follow = models
    assert neq.flops.count(follow, x).owned == neq.flops.count(train, x).owned < 1
    names = [f"rnn.{name}" for name, _ in plain.rnn.named_parameters()]
    assert list(neq.verify(follow, x)) == list(neq.verify(train, x)) == names
