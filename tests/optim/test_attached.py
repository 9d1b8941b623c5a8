"""What attach accepts, reports and notices: errors, changed models, shared parameters."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import LBFGS, SGD, Adam, RMSprop

from neq_kernels.conversion.convert import convert, revert
from neq_kernels.optim import attach
from tests.support.optimizer_nets import layers, make_net, owner_masks, plain_net, set_gradients


def step(net, optimizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def moved(net, before):
    return [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]


def values(net):
    return [p.detach().clone() for p in net.parameters()]


# --- errors --------------------------------------------------------------------------------------


def test_a_model_that_was_not_converted():
    net = plain_net()
    with pytest.raises(ValueError, match=r"neq_kernels\.convert\(model\) before attach"):
        attach(SGD(net.parameters()), net)


def test_an_optimizer_of_another_model():
    with pytest.raises(ValueError, match="expected it to hold parameters of the model's neuron"):
        attach(SGD(make_net().parameters()), make_net())


def test_an_optimizer_of_the_other_parameters_only():
    net = make_net()
    with pytest.raises(ValueError, match="expected it to hold parameters of the model's neuron"):
        attach(SGD([net.gain]), net)


@pytest.mark.parametrize("frozen_state", ["zero", "", None])
def test_an_unknown_frozen_state(frozen_state):
    net = make_net()
    with pytest.raises(ValueError, match=r"frozen_state: expected one of .*'reset'"):
        attach(SGD(net.parameters()), net, frozen_state)


def test_lbfgs():
    net = make_net()
    with pytest.raises(TypeError, match="LBFGS"):
        attach(LBFGS(net.parameters()), net)


def test_no_optimizer():
    net = make_net()
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got Net"):
        attach(net, net)


class Flat(FullyShardedDataParallel):
    """Shaped as FSDP1, which starts on no CPU."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = module


def test_flat_parameters_are_refused_in_words():
    inner = make_net()
    with pytest.raises(TypeError, match=r"got FullyShardedDataParallel, which flattens .*FSDP2"):
        attach(SGD(inner.parameters()), nn.Sequential(Flat(inner)))


@pytest.mark.parametrize("optimizer_class", [SGD, RMSprop])
def test_attaching_twice(optimizer_class):
    net = make_net()
    optimizer = optimizer_class(net.parameters())
    handle = attach(optimizer, net)
    with pytest.raises(ValueError, match="call remove"):
        attach(optimizer, net)
    handle.remove()
    attach(optimizer, net)


def test_a_refused_attach_leaves_no_hooks():
    net = make_net()
    optimizer = SGD([net.gain])
    with pytest.raises(ValueError, match="expected it to hold"):
        attach(optimizer, net)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# --- report and remove ---------------------------------------------------------------------------


def test_report():
    net = make_net()
    foreign = nn.Parameter(torch.zeros(1))
    handle = attach(Adam([*net.parameters(), foreign]), net)
    report = {u.name: (u.update, u.reason) for u in handle.report()}
    assert {name for name, (update, _) in report.items() if update == "rows"} == set(
        owner_masks(net)
    )
    assert report["gain"] == ("torch", "no neuron owns it")
    assert report["optimizer parameter 12"] == ("torch", "no neuron owns it")


def test_the_reason_for_the_guard_is_logged_once(caplog):
    net = make_net()
    optimizer = RMSprop(net.parameters())
    with caplog.at_level(logging.WARNING, logger="neq_kernels"):
        handle = attach(optimizer, net)
        step(net, optimizer)
    assert len(caplog.records) == 1
    assert "RMSprop has no row steps" in caplog.text
    assert all("RMSprop" in u.reason for u in handle.report() if u.update == "guard")


def test_remove_gives_everything_back_to_torch():
    net = make_net()
    optimizer = Adam(net.parameters())
    handle = attach(optimizer, net)
    layers(net)["linear"].channels.set([0])
    step(net, optimizer)
    step(net, optimizer)
    handle.remove()
    before = values(net)
    step(net, optimizer)
    assert all(moved(net, before))
    assert (net.linear.weight != before[-2]).all()
    assert "neq_step" not in optimizer.state[net.linear.weight]
    assert optimizer.state[net.linear.weight]["step"] == 3
    assert not optimizer._optimizer_step_pre_hooks


# --- models that change --------------------------------------------------------------------------


def test_reverted_layers_are_torchs_again_and_converted_ones_ours():
    net = make_net()
    optimizer = Adam(net.parameters())
    attach(optimizer, net)
    layers(net)["linear"].channels.set([0])
    step(net, optimizer)
    revert(net)
    before = net.linear.weight.detach().clone()
    step(net, optimizer)
    assert (net.linear.weight != before).all()
    convert(net)
    layers(net)["linear"].channels.set([1])
    before = net.linear.weight.detach().clone()
    step(net, optimizer)
    others = [0, 2, 3, 4]
    assert torch.equal(net.linear.weight.detach()[others], before[others])
    assert optimizer.state[net.linear.weight]["neq_step"].tolist() == [0, 3, 0, 0, 0]


def test_layers_reverted_and_converted_between_steps_have_a_new_active_set():
    net = make_net()
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    attach(optimizer, net)
    layers(net)["linear"].channels.set([0])
    step(net, optimizer)
    revert(net)
    convert(net)
    layers(net)["linear"].channels.set([3])
    before = net.linear.weight.detach().clone()
    step(net, optimizer)
    changed = (net.linear.weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert changed == [3]


def test_layers_converted_after_attach_are_seen():
    net = plain_net()
    convert(net, filter=lambda name, module: name == "conv")
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    attach(optimizer, net)
    convert(net)
    layers(net)["linear"].channels.set([2])
    before = net.linear.weight.detach().clone()
    step(net, optimizer)
    assert torch.equal(net.linear.weight.detach()[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_conversion_in_place_of_dtype_keeps_the_map():
    net = make_net(torch.float32)
    optimizer = SGD(net.parameters(), lr=0.1)
    attach(optimizer, net)
    net.to(torch.float64)
    layers(net)["linear"].channels.set([2])
    before = net.linear.weight.detach().clone()
    step(net, optimizer)
    assert torch.equal(net.linear.weight.detach()[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    assert not torch.equal(net.linear.weight, before)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_replaced_parameter_the_optimizer_still_holds_is_an_error(guarded):
    net = make_net()
    optimizer = (RMSprop if guarded else SGD)(net.parameters())
    attach(optimizer, net)
    net.linear.weight = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"linear\.weight: the optimizer holds a parameter"):
            step(net, optimizer)


def test_parameters_swapped_by_model_to_are_an_error():
    net = make_net(torch.float32)
    optimizer = SGD(net.parameters())
    attach(optimizer, net)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.raises(RuntimeError, match="the model has replaced"):
        step(net, optimizer)


def test_a_parameter_replaced_in_the_optimizer_too_is_fine():
    net = make_net()
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    attach(optimizer, net)
    old = net.linear.weight
    new = nn.Parameter(old.detach().clone())
    net.linear.weight = new
    params = optimizer.param_groups[0]["params"]
    params[[p is old for p in params].index(True)] = new
    layers(net)["linear"].channels.set([4])
    step(net, optimizer)
    assert torch.equal(new.detach()[:4], old.detach()[:4])
    assert not torch.equal(new.detach()[4], old.detach()[4])


def test_wrapped_models():
    net = make_net()
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    attach(optimizer, torch.compile(net, backend="eager"))
    layers(net)["linear"].channels.set([4])
    before = net.linear.weight.detach().clone()
    step(net, optimizer)
    assert torch.equal(net.linear.weight.detach()[:4], before[:4])


# --- shared and followed parameters --------------------------------------------------------------


class Tied(nn.Module):
    """Two linear layers that were tied after they were converted."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        convert(self)
        self.b.weight = self.a.weight


def test_layers_tied_after_convert_are_an_error_that_convert_repairs():
    net = Tied()
    net.a.channels.set([0])
    net.b.channels.set([0, 2])
    optimizer = SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"for a and b, which share a .*got two; .*again"):
        attach(optimizer, net)
    convert(net)
    assert net.a.channels is net.b.channels
    attach(optimizer, net)
    before = net.a.weight.detach().clone()
    step(net, optimizer)
    changed = (net.a.weight.detach() != before).any(1)
    assert changed.tolist() == net.a.channels.mask.tolist() == [True, False, True]


def test_a_tie_made_or_broken_after_attach_is_an_error():
    net = Tied()
    convert(net)
    optimizer = SGD(net.parameters(), lr=0.1)
    attach(optimizer, net)
    step(net, optimizer)
    net.b.weight = nn.Parameter(net.a.weight.detach().clone())
    with pytest.raises(ValueError, match="for a and b, which share no parameter any"):
        optimizer.step()
    convert(net)
    assert net.a.channels is not net.b.channels
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"b\.weight: it was tied to a\.weight and is an"):
            step(net, optimizer)
    optimizer.add_param_group({"params": [net.b.weight]})
    before = net.b.weight.detach().clone()
    step(net, optimizer)
    assert not torch.equal(net.b.weight, before)
    net.b.bias = net.a.bias
    with pytest.raises(ValueError, match=r"for a and b, which share a .*got two; .*again"):
        optimizer.step()


def transposed_tie():
    """A row of the one is a column of the other."""
    net = nn.Module()
    net.up = nn.ConvTranspose1d(4, 3, 1, bias=False)
    net.down = nn.Conv1d(3, 4, 1, bias=False)
    convert(net.double())
    net.down.weight = net.up.weight
    return net


@pytest.mark.parametrize("make", [SGD, Adam, RMSprop])
@pytest.mark.filterwarnings("ignore:.*has no row per neuron:UserWarning")
def test_an_element_of_different_neurons_is_frozen_only_when_all_of_them_are(make):
    net = transposed_tie()
    optimizer = make(net.parameters(), lr=0.1, weight_decay=0.1)
    (update,) = attach(optimizer, net).report()
    assert update.update == "guard"
    for columns, rows in (([0], [1, 3]), ([], [2]), ([2], []), ([], []), ([0, 1, 2], [])):
        net.up.channels.set(columns)
        net.down.channels.set(rows)
        before = net.up.weight.detach().clone()
        step(net, optimizer)
        expected = torch.zeros(4, 3, 1, dtype=torch.bool)
        expected[:, columns] = True
        expected[rows] = True
        assert torch.equal(net.up.weight.detach() != before, expected)


def test_a_parameter_of_another_shape_than_was_converted_is_an_error():
    net = make_net()
    net.linear.weight = nn.Parameter(net.linear.weight.detach()[:3])
    with pytest.raises(ValueError, match=r"linear\.weight: expected 5 neurons at .*, got 3"):
        attach(SGD(net.parameters()), net)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.linear(x) * self.scale


@pytest.mark.parametrize("make", [lambda ps: Adam(ps, weight_decay=0.1), RMSprop])
@pytest.mark.filterwarnings("ignore:.*has no row per neuron:UserWarning")
def test_parameters_that_follow_their_block(make):
    net = convert(nn.Sequential(Block(), nn.Linear(4, 2)), others="follow")
    optimizer = make(net.parameters())
    handle = attach(optimizer, net)
    assert {u.name: u.update for u in handle.report()}["0.scale"] != "torch"
    for active, moves in (([0], True), ([], False), ([1, 2], True)):
        net[0].linear.channels.set(active)
        before = net[0].scale.detach().clone()
        step(net, optimizer)
        assert torch.equal(net[0].scale, before) is not moves


# --- training ------------------------------------------------------------------------------------


def test_training_a_converted_model_with_changing_sets():
    """Gradients from backward, against dense ones with the frozen rows put back by hand."""
    net, plain = make_net(), plain_net()
    optimizer = SGD(net.parameters(), lr=0.05, weight_decay=0.1)
    expected = SGD(plain.parameters(), lr=0.05, weight_decay=0.1)
    attach(optimizer, net)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    for _ in range(6):
        for layer in layers(net).values():
            k = len(layer.channels)
            n = int(torch.randint(0, k + 1, (), generator=generator))
            layer.channels.set(torch.randperm(k, generator=generator)[:n])
        masks = owner_masks(net)
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        for model, opt in ((net, optimizer), (plain, expected)):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if name in masks:
                    keep = net.get_submodule(name.rpartition(".")[0])
                    layout = dict(keep.neuron_parameters())[net.get_parameter(name)]
                    frozen = (~masks[name]).nonzero().flatten()
                    layout.scatter_(p, frozen, layout.gather(before[name], frozen))
        torch.testing.assert_close(
            dict(net.named_parameters()), dict(plain.named_parameters()), rtol=1e-10, atol=1e-12
        )


def test_set_gradients_poisons_what_must_not_be_read():
    """The other tests rest on it."""
    net = make_net()
    layers(net)["grouped_up"].channels.set([0, 3])
    set_gradients(net, torch.Generator().manual_seed(0))
    nan = net.grouped_up.weight.grad.isnan()
    assert nan[:3, 1].all()
    assert nan[3:, 0].all()
    assert not nan[:3, 0].any()
    assert not nan[3:, 1].any()
