"""Inputs and parameters that no kernel reads, tracers, and hooks of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import neq_kernels as neq
from neq_kernels import ActiveChannels
from neq_kernels.functional import conv
from tests.support import oracle
from tests.support.layer_cases import assert_masked, every_layer, frozen_net, net, twins


def half_frozen(layer):
    plain, ours = copy.deepcopy(layer), neq.convert(layer)
    ours.channels.set(oracle.half(len(ours.channels)))
    return plain, ours


def assert_gradients(ours, plain):
    """Active rows bit-equal, frozen ones zero: the same operators compute both."""
    for parameter, dense in zip(ours.parameters(), plain.parameters(), strict=True):
        expected = dense.grad.index_fill(0, ours.channels.frozen, 0)
        torch.testing.assert_close(parameter.grad, expected)
        assert not parameter.grad[ours.channels.frozen].any()


def jagged():
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("all_active", [True, False])
def test_a_jagged_tensor(all_active):
    plain, ours = half_frozen(nn.Linear(4, 6))
    if all_active:
        ours.channels.reset()
    x = jagged()
    for layer in (plain, ours):
        layer(x).values().square().sum().backward()
    assert_gradients(ours, plain)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse])
@pytest.mark.parametrize("all_active", [True, False])
def test_a_sparse_tensor(sparse, all_active):
    plain, ours = half_frozen(nn.Linear(4, 6, bias=sparse is torch.Tensor.to_sparse_csr))
    if all_active:
        ours.channels.reset()
    x = sparse(torch.eye(4))
    for layer in (plain, ours):
        layer(x).square().sum().backward()
    assert_gradients(ours, plain)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_a_strided_nested_tensor():
    plain, ours = half_frozen(nn.Linear(4, 6))
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    for layer in (plain, ours):
        sum(part.square().sum() for part in layer(x).unbind()).backward()
    assert_gradients(ours, plain)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 6), lambda: nn.Conv1d(4, 6, 1)])
def test_complex_parameters(layer):
    """Made so after conversion."""
    plain, ours = half_frozen(layer())
    x = torch.randn(2, 4, *[3] * isinstance(ours, nn.Conv1d), dtype=torch.complex64)
    for model in (plain.to(torch.complex64), ours.to(torch.complex64)):
        model(x).abs().square().sum().backward()
    assert_gradients(ours, plain)
    ours.channels.set([])
    assert not ours(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_an_input_of_integers_is_refused(dtype):
    layer = neq.convert(nn.Linear(4, 6))
    with pytest.raises(TypeError, match="input: expected a floating-point tensor"):
        layer(torch.ones(2, 4, dtype=dtype))


@every_layer
def test_a_symbolic_trace_keeps_the_layer(name):
    plain, ours, x = twins(name, oracle.half)
    traced = symbolic_trace(nn.Sequential(ours))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0"]
    assert torch.equal(traced(x), plain(x))
    traced(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_masked(ours, plain)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_a_scripted_model_has_no_neurons():
    model, x = frozen_net().eval(), torch.randn(2, 3, 5, 5)
    with pytest.raises(RuntimeError, match=r"got the converted Conv2d.*revert\(copy.deepcopy"):
        torch.jit.script(model)
    assert model[0].channels.n_active == 2
    plain = neq.revert(copy.deepcopy(model))
    assert torch.equal(torch.jit.script(plain)(x), model(x))


def test_torchvisions_feature_extractor_learns_what_is_active():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = frozen_net()
    features = create_feature_extractor(model, ["0", "2"])
    x = torch.randn(2, 3, 5, 5)
    out = features(x)
    assert torch.equal(out["0"], net_output(model, x))
    out["2"].sum().backward()
    oracle.assert_frozen_are_zero(model[0].weight.grad, [True, False, False, True])


def net_output(model, x):
    return model[0](x)


def hooked(model):
    """The names of the parameters whose hooks ran, in a step."""
    ran = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: ran.append((name, float(g.norm()))))
    return ran


def test_hooks_of_a_wholly_frozen_layers_parameters_do_not_run():
    """As with requires_grad=False; what loggers of gradients hook."""
    model = neq.convert(net())
    model[4].channels.set([])
    model[1].channels.set([])
    ran = hooked(model)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert {name for name, _ in ran} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("autocast", [False, True])
def test_nor_where_the_call_is_not_planned(autocast):
    layer = neq.convert(nn.Linear(4, 3))
    layer.channels.set([])
    ran = hooked(layer)
    x = torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x).sum().backward()
        conv(x[..., None], layer.weight[..., None], None, ActiveChannels(3)).sum()
    assert x.grad is not None
    assert not ran


def test_clipping_where_everything_is_frozen():
    model = neq.convert(net())
    for layer in (model[0], model[1], model[4]):
        layer.channels.set([])
    out = model(torch.randn(2, 3, 5, 5))
    assert not out.requires_grad
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0


def test_grouped_transposed_convolutions_take_batched_gradients():
    plain, ours = half_frozen(nn.ConvTranspose2d(4, 6, 3, groups=2))
    x = torch.randn(2, 4, 5, 5)
    for layer in (plain, ours):
        out = layer(x)
        (layer.grads,) = torch.autograd.grad(
            out, layer.weight, torch.stack([out.detach()] * 2), is_grads_batched=True
        )
    for group in range(2):
        rows = slice(2 * group, 2 * group + 2)
        active = ours.channels.mask[3 * group : 3 * group + 3]
        got, dense = ours.grads[:, rows], plain.grads[:, rows]
        torch.testing.assert_close(got[:, :, active], dense[:, :, active])
        assert not got[:, :, ~active].any()
