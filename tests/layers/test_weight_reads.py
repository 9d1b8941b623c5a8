"""Layers whose weight is read by the module around them and that are not called."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners
from tests.support import oracle
from tests.support.models import assert_model_gradients, freeze, set_ragged


class Read(nn.Module):
    """Reads every weight, calls no layer."""

    def __init__(self):
        super().__init__()
        self.product, self.other_bias, self.plain = (nn.Linear(6, 6) for _ in range(3))
        self.conv = nn.Conv1d(6, 6, 3, groups=6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = F.linear(x, self.product.weight, self.product.bias)
        x = F.linear(x, self.other_bias.weight, bias=self.other_bias.bias.clone() * 2 + self.shift)
        x = torch.einsum("ni,oi->no", x, self.plain.weight) + torch.cat([self.plain.bias])
        x = (x.T[None] * self.conv.weight.squeeze(1).sum(-1, keepdim=True))[0].T
        return F.layer_norm(x, (6,), self.norm.weight, self.norm.bias)


def both():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), Read(), nn.Linear(6, 3)).double()
    return plain, neq.convert(copy.deepcopy(plain))


def inputs():
    return torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def backward(model, x):
    model.zero_grad()
    model(x).square().sum().backward()


def test_whatever_is_computed_from_a_weight_has_gradients_of_active_rows():
    plain, ours = both()
    x = inputs()
    assert torch.equal(ours(x), plain(x))
    assert neq.verify(ours, x) == ["1.shift"]
    for shift in range(3):
        set_ragged(ours, shift)
        assert torch.equal(ours(x), plain(x))
        for model in (plain, ours):
            backward(model, x)
        assert_model_gradients(ours, plain)


def test_wholly_frozen_backprop_stops():
    _, ours = both()
    ours[1].shift.requires_grad_(False)
    freeze(ours)
    assert not ours(inputs()).requires_grad
    ours[2].channels.reset()
    backward(ours, inputs())
    assert [n for n, p in ours.named_parameters() if p.grad is not None] == ["2.weight", "2.bias"]


def test_a_product_with_a_weight_is_a_call_of_the_layer():
    _, ours = both()
    seen = []
    for name in ("product", "other_bias", "plain"):
        layer = getattr(ours[1], name)
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    ours(inputs())
    with torch.no_grad():
        ours(inputs())
    assert seen == ["product", "other_bias"] * 2
    ours[1].product.channels.set([0])
    with oracle.CalledOps() as called:
        backward(ours, inputs())
    assert called.names.count("linear_backward") <= 1
    rows = {row.name: row for row in neq.flops.count(ours, inputs()).layers}
    assert rows["1.product"].macs == rows["1.other_bias"].macs == 36
    assert rows["1.product"].wgrad_macs == 6
    assert {name for name in rows if "1." in name} >= {"1.product", "1.other_bias", "1.norm"}


def test_parameters_are_themselves_for_everybody_else():
    _, ours = both()
    before = dict(ours.named_parameters())
    seen = []
    ours[1].product.register_forward_hook(
        lambda layer, *_: seen.append((dict(ours.named_parameters()), layer.bias))
    )
    ours(inputs())
    ((during, _),) = seen
    assert during.keys() == before.keys()
    assert all(during[n] is p for n, p in before.items())
    assert ours[1].product.weight is before["1.product.weight"]
    with pytest.raises(RuntimeError):
        ours(torch.randn(7, 5, dtype=torch.float64))
    assert ours[1].product.weight is before["1.product.weight"]
    assert "neq_replaced" not in vars(ours[1])


def test_copies_and_revert():
    plain, ours = both()
    set_ragged(ours)
    x = inputs()
    backward(ours, x)
    grads = [p.grad for p in ours.parameters()]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False), neq.convert(ours)):
        backward(other, x)
        assert all(map(torch.equal, [p.grad for p in other.parameters()], grads))
    assert len(ours[1]._forward_pre_hooks) == 1
    neq.revert(ours)
    assert vars(ours[1]).keys() == vars(plain[1]).keys()
    assert not ours[1]._forward_pre_hooks
    assert not ours[1]._forward_hooks
    for model in (plain, ours):
        backward(model, x)
    assert all(map(torch.equal, *([p.grad for p in m.parameters()] for m in (plain, ours))))


def test_what_changes_a_weight_in_forward_changes_the_parameter():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                self.linear.weight.copy_(F.normalize(self.linear.weight))
            return F.linear(x, self.linear.weight)

    ours = neq.convert(Normed())
    ours.linear.channels.set([1])
    backward(ours, torch.randn(3, 4))
    assert torch.allclose(ours.linear.weight.norm(dim=1), torch.ones(4))
    oracle.assert_frozen_are_zero(ours.linear.weight.grad, [False, True, False, False])


def test_a_module_replaced_later_is_left_alone():
    _, ours = both()
    ours[1].product = nn.Linear(6, 6, dtype=torch.float64)
    backward(ours, inputs())
    assert ours[1].product.weight.grad.ne(0).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    _, ours = both()
    set_ragged(ours)
    x = inputs()
    backward(ours, x)
    grads = [p.grad for p in ours.parameters()]
    ours.zero_grad()
    hidden = checkpoint(ours[1], ours[0](x), use_reentrant=reentrant)
    ours[2](hidden).square().sum().backward()
    assert all(map(torch.equal, [p.grad for p in ours.parameters()], grads))


def test_one_graph_for_all_masks():
    _, ours = both()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = inputs()
    for shift in range(3):
        set_ragged(ours, shift)
        grads = []
        for model in (ours, compiled):
            ours.zero_grad()
            model(x).square().sum().backward()
            grads.append([p.grad for p in ours.parameters()])
        for found, expected in zip(*grads, strict=True):
            oracle.assert_close64(found, expected, 1e-9)


def test_exported_programs_are_plain():
    _, ours = both()
    set_ragged(ours)
    x = inputs()
    program = torch.export.export(ours, (x,))
    assert not [node for node in program.graph.nodes if "neq" in str(node.target)]
    oracle.assert_close64(program.module()(x), ours(x))


def test_a_reader_is_one_module_in_a_graph_of_torch_fx():
    plain, ours = both()
    traced = torch.fx.symbolic_trace(ours)
    assert [node.target for node in traced.graph.nodes][1:4] == ["0", "1", "2"]
    set_ragged(ours)
    for model in (plain, traced):
        backward(model, inputs())
    assert_model_gradients(ours, plain)


def test_linear_cross_entropy():
    torch.manual_seed(0)
    plain = nn.LinearCrossEntropyLoss(6, 5).double()
    ours = neq.convert(copy.deepcopy(plain))
    ours.linear.channels.set([0, 3])
    x, target = inputs(), torch.arange(7) % 5
    for model in (plain, ours):
        model(x, target).backward()
    assert_model_gradients(ours, plain)
    ours.zero_grad()
    ours.linear.channels.set([])
    assert not ours(x, target).requires_grad


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_stopped_and_started_in_data_parallel_training():
    _, ours = both()
    alone = copy.deepcopy(ours)
    wrapped = DistributedDataParallel(ours)
    x = inputs()
    for names in ([], ["1.product"], ["1.product", "1.conv", "0"], ["1.plain", "0"], []):
        for model in (ours, alone):
            for name, layer in named_neuron_layers(model):
                layer.channels.set([] if name in names else range(len(layer.channels)))
        for model, run in ((ours, wrapped), (alone, alone)):
            model.zero_grad()
            run(x).square().sum().backward()
        for found, expected in zip(ours.parameters(), alone.parameters(), strict=True):
            zero = torch.zeros_like(expected)
            assert torch.equal(found.grad, zero if expected.grad is None else expected.grad)


def test_derivatives_of_higher_order_hold_frozen_neurons():
    """Against the dense model, with the frozen rows put in as constants."""
    plain, ours = both()
    set_ragged(ours)
    owners = neuron_owners(ours)
    x = inputs()
    values = {}
    for (name, parameter), own in zip(ours.named_parameters(), plain.parameters(), strict=True):
        values[name] = own
        for channels, layout in owners.get(parameter, ()):
            constant = own.detach().clone()
            mask = torch.zeros_like(own, dtype=torch.bool)
            layout.fill_(mask, channels.active, True)
            values[name] = torch.where(mask, own, constant)

    def penalty(outputs, parameters):
        grads = torch.autograd.grad(outputs.square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    dense = penalty(torch.func.functional_call(plain, values, (x,)), tuple(plain.parameters()))
    for found, expected in zip(penalty(ours(x), tuple(ours.parameters())), dense, strict=True):
        oracle.assert_close64(found, expected, 1e-9)


def test_function_transforms_hold_frozen_neurons():
    _, ours = both()
    set_ragged(ours)
    x = inputs()
    backward(ours, x)

    def loss(parameters):
        return torch.func.functional_call(ours, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(dict(ours.named_parameters()))
    for name, parameter in ours.named_parameters():
        oracle.assert_close64(grads[name], parameter.grad, 1e-9)


class Decoder(nn.Module):
    """As Perceiver's: the table comes as an argument, and is called elsewhere."""

    def forward(self, x, table, bias=None):
        return x @ table.weight.t() + (0 if bias is None else bias)


class Handing(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.decoder = nn.Embedding(6, 4), Decoder()

    def forward(self, tokens, by_name):
        x = self.table(tokens)
        return self.decoder(x, table=self.table) if by_name else self.decoder(x, self.table)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("active", [[1, 4], range(6), []])
def test_a_layer_that_is_handed_to_the_module_that_reads_it(by_name, active):
    plain = Handing().double()
    ours = neq.convert(copy.deepcopy(plain))
    ours.table.channels.set(active)
    tokens = torch.tensor([0, 1, 4])
    outputs = [model(tokens, by_name) for model in (plain, ours)]
    assert torch.equal(*outputs)
    if not len(active):
        assert not outputs[1].requires_grad
        return
    for output in outputs:
        output.square().sum().backward()
    frozen = ours.table.channels.frozen
    expected = plain.table.weight.grad.index_fill(0, frozen, 0)
    torch.testing.assert_close(ours.table.weight.grad, expected, rtol=1e-12, atol=1e-12)
    assert not ours.table.weight.grad[frozen].any()
    assert neq.verify(ours, {"tokens": tokens, "by_name": by_name}) == []


class Checkpointed(nn.Module):
    def __init__(self, reentrant, product):
        super().__init__()
        self.layer, self.reentrant, self.product = nn.Linear(4, 4), reentrant, product

    def body(self, x):
        if self.product:
            return F.linear(x, self.layer.weight, self.layer.bias).tanh()
        return (x @ self.layer.weight.t()).tanh()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("product", [False, True])
def test_a_checkpoint_inside_the_reader_is_refused(reentrant, product):
    """Its recomputation would see the parameters themselves."""
    plain = nn.Sequential(nn.Linear(4, 4), Checkpointed(reentrant, product))
    model, x = neq.convert(copy.deepcopy(plain)), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"Checkpointed reads .* checkpoint in its own forward"):
        model(x)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    model[1].layer.requires_grad_(False)
    model(x).sum().backward()
    assert model[0].weight.grad.any()
