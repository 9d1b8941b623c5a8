"""Derivatives of every order and kind: of the dense layer with its frozen neurons constant."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call

import neq_kernels as neq
from neq_kernels import ActiveChannels
from neq_kernels.functional import conv, linear
from tests.support import oracle
from tests.support.layer_cases import every_layer, layout_of, twins

MASKS = {
    "none": lambda k: [False] * k,
    "one": lambda k: [i == k - 1 for i in range(k)],
    "half": oracle.half,
    "all": lambda k: [True] * k,
}
every_mask = pytest.mark.parametrize("mask", MASKS)


def active_elements(layer, name, parameter):
    """True where the neuron of an element is active."""
    where = layout_of(layer) if name == "weight" else {}
    return oracle.zero_frozen(
        torch.ones_like(parameter), layer.channels.mask.tolist(), **where
    ).bool()


class Both:
    """A converted layer with some neurons frozen, and the dense one with these as constants."""

    def __init__(self, name, mask):
        self.plain, self.ours, self.x = twins(name, MASKS[mask])
        self.elements = {
            n: active_elements(self.ours, n, p) for n, p in self.plain.named_parameters()
        }

    def parameters(self):
        return {name: p.detach().clone() for name, p in self.plain.named_parameters()}

    def dense(self, parameters, x):
        constant = {
            name: torch.where(self.elements[name], p, p.detach()) for name, p in parameters.items()
        }
        return functional_call(self.plain, constant, (x,)).sin()

    def frozen(self, parameters, x):
        return functional_call(self.ours, parameters, (x,)).sin()

    def compare(self, derivatives):
        """``derivatives(model, parameters, x)``: nested tensors, None for no gradient."""
        expected, got = (
            torch.utils._pytree.tree_leaves(
                derivatives(model, self.parameters(), self.x.clone()), is_leaf=lambda t: t is None
            )
            for model in (self.dense, self.frozen)
        )
        assert len(expected) == len(got) > 0
        for a, b in zip(expected, got, strict=True):
            if a is None or b is None:
                assert all(t is None or not t.any() for t in (a, b))
            else:
                oracle.assert_close64(b, a, 1e-10)


def learning(parameters):
    return [p.requires_grad_() for p in parameters.values()]


def grad(output, inputs, **options):
    return torch.autograd.grad(output, inputs, allow_unused=True, **options)


def weighted(grads):
    """A scalar of them."""
    return sum(
        (g * torch.linspace(-1, 1, g.numel()).view_as(g)).sum() for g in grads if g is not None
    )


def gradient_penalty(model, parameters, x):
    leaves = [*learning(parameters), x.requires_grad_()]
    out = model(parameters, x)
    (gx,) = grad(out.sum(), x, create_graph=True)
    return grad((gx.norm() - 1).square() + out.square().mean(), leaves)


def hessian_vector_product(model, parameters, x):
    leaves = [*learning(parameters), x.requires_grad_()]
    grads = grad(model(parameters, x).square().sum(), leaves, create_graph=True)
    return grads, grad(weighted(grads), leaves)


def third_order(model, parameters, x):
    leaves = [*learning(parameters), x.requires_grad_()]
    first = grad(model(parameters, x).square().sum(), leaves, create_graph=True)
    second = grad(weighted(first), leaves, create_graph=True)
    return grad(weighted(second), leaves)


def maml(model, parameters, x):
    """The gradient through one step of gradient descent."""
    leaves = learning(parameters)
    x.requires_grad_()
    grads = grad(model(parameters, x).square().sum(), leaves, create_graph=True)
    fast = {
        name: p if g is None else p - 0.1 * g
        for (name, p), g in zip(parameters.items(), grads, strict=True)
    }
    return grad(model(fast, x).square().sum(), [*leaves, x])


@every_layer
@every_mask
@pytest.mark.parametrize("derivatives", [gradient_penalty, hessian_vector_product, maml])
def test_reverse_over_reverse(name, mask, derivatives):
    Both(name, mask).compare(derivatives)


# PyTorch has no third derivative of the others.
@pytest.mark.parametrize("name", ["linear 3d biased", "conv2d grouped", "group_norm"])
@every_mask
def test_third_order(name, mask):
    Both(name, mask).compare(third_order)


def forward_mode(model, parameters, x):
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, torch.ones_like(p)) for n, p in parameters.items()}
        return forward_ad.unpack_dual(model(duals, forward_ad.make_dual(x, x.cos()))).tangent


def forward_over_reverse(model, parameters, x):
    def loss(parameters, x):
        return model(parameters, x).square().sum()

    tangents = ({n: torch.ones_like(p) for n, p in parameters.items()}, x.cos())
    return torch.func.jvp(torch.func.grad(loss, argnums=(0, 1)), (parameters, x), tangents)


def reverse_over_forward(model, parameters, x):
    def loss(parameters, x):
        tangents = ({n: torch.ones_like(p) for n, p in parameters.items()}, x.cos())
        return torch.func.jvp(model, (parameters, x), tangents)[1].sum()

    return torch.func.grad(loss, argnums=(0, 1))(parameters, x)


def jacobian(model, parameters, x):
    return torch.func.jacrev(model, argnums=(0, 1))(parameters, x)


# BatchNorm counts in place, which no transform allows.
transformable = pytest.mark.parametrize(
    "name", [n for n in every_layer.args[1] if "batch_norm" not in n]
)


@transformable
@pytest.mark.parametrize("mask", ["none", "half", "all"])
@pytest.mark.parametrize(
    "derivatives", [forward_mode, forward_over_reverse, reverse_over_forward, jacobian]
)
def test_forward_mode_and_function_transforms(name, mask, derivatives):
    Both(name, mask).compare(derivatives)


@every_layer
@pytest.mark.parametrize("mask", ["none", "half"])
def test_batched_gradients(name, mask):
    def derivatives(model, parameters, x):
        leaves = [*learning(parameters), x.requires_grad_()]
        out = model(parameters, x)
        return grad(
            out, leaves, grad_outputs=torch.stack([out.detach(), out.cos()]), is_grads_batched=True
        )

    Both(name, mask).compare(derivatives)


@pytest.mark.parametrize("mask", ["one", "half"])
@pytest.mark.parametrize(
    "of_channels", [linear, lambda x, *args, **kw: conv(x[..., None], *args, **kw)]
)
def test_of_the_approximate_input_gradient(mask, of_channels):
    """Frozen channels propagate nothing, to no order: as if their outputs were constants."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    channels = oracle.channels_with(MASKS[mask](5))
    is_conv = of_channels is not linear
    weight = torch.randn(5, 4, *[1] * is_conv, dtype=torch.float64, requires_grad=True)

    def ours(x, w):
        return of_channels(x, w, None, channels, grad_input="active").flatten(1).sin()

    def dense(x, w):
        out = x @ w.view(5, 4).t()
        return torch.where(channels.mask, out, out.detach()).sin()

    results = []
    for f in (ours, dense):
        dx, dw = torch.autograd.grad(f(x, weight).sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, weight))
        transformed = torch.func.grad(lambda x, w, f=f: f(x, w).sum(), argnums=(0, 1))(x, weight)
        results.append([dx, dw, *second, *transformed])
    for a, b in zip(*results, strict=True):
        oracle.assert_close64(a, b.view_as(a), 1e-12)


def test_under_autocast():
    layer = neq.convert(nn.Linear(6, 4))
    plain = copy.deepcopy(layer)
    layer.channels.set([0, 2])
    x = torch.randn(5, 6)
    results = []
    for model in (layer, plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(leaf)
        (dx,) = torch.autograd.grad(out.float().sin().sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        results.append((leaf.grad, model.weight.grad))
    (dx, dw), (dense_dx, dense_dw) = results
    assert torch.equal(dw[[1, 3]], torch.zeros(2, 6))
    torch.testing.assert_close(dw[[0, 2]], dense_dw[[0, 2]], rtol=0.02, atol=0.02)
    torch.testing.assert_close(dx, dense_dx, rtol=0.02, atol=0.02)


def test_a_penalty_on_the_gradient_of_a_partly_frozen_last_layer():
    """PatchGAN's discriminator with WGAN-GP's penalty."""
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3)).double()
    ours = neq.convert(copy.deepcopy(dense))
    ours[2].channels.set([0, 1])
    for model in (dense, ours):
        x = torch.ones(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(model(x).mean(), x, create_graph=True)
        (model(x).mean() + 10 * (g.flatten(1).norm(2, 1) - 1).pow(2).mean()).backward()
    oracle.assert_close64(ours[0].weight.grad, dense[0].weight.grad, 1e-12)
    oracle.assert_close64(ours[2].weight.grad[:2], dense[2].weight.grad[:2], 1e-12)
    assert not ours[2].weight.grad[2:].any()


def test_a_change_of_the_mask_before_the_second_derivative_raises():
    channels = oracle.channels_with([True, False])
    x, weight = torch.randn(3, 2, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(linear(x, weight, None, channels).sum(), x, create_graph=True)
    channels.set([1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dx.square().sum().backward()


def test_a_wholly_frozen_layer_saves_no_input_though_it_can_be_differentiated_twice():
    saved = []
    layer = neq.convert(nn.Linear(4, 3))
    layer.channels.set([])
    x = torch.randn(2, 4).mul(1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert all(t.data_ptr() != x.data_ptr() for t in saved)
    (dx,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert second.any()
    assert layer.weight.grad is None


def test_parameters_without_a_gradient_keep_their_tangents_where_active():
    weight, tangent = torch.randn(3, 4), torch.randn(3, 4)
    x, channels = torch.randn(2, 4), oracle.channels_with([True, False, True])
    with forward_ad.dual_level():
        out = linear(x, forward_ad.make_dual(weight, tangent), None, channels)
        got = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(got, x @ tangent.mul(channels.mask[:, None]).t())


def test_everything_active_is_pytorchs_in_a_transform():
    x, weight, channels = torch.randn(2, 4), torch.randn(3, 4), ActiveChannels(3)
    with oracle.CalledOps() as called:
        torch.func.grad(lambda w: linear(x, w, None, channels).sum())(weight)
    assert "where" not in called.that_compute()


@pytest.mark.parametrize("mask", ["none", "half", "all"])
def test_embeddings_in_transforms_and_forward_mode(mask):
    tokens, ours = torch.tensor([[0, 3, 3], [1, 5, 2]]), neq.convert(nn.Embedding(6, 4).double())
    ours.channels.set(MASKS[mask](6))
    table, is_active = ours.weight.detach(), ours.channels.mask[:, None]

    def loss(model):
        return lambda w: model(w).sin().square().sum()

    def frozen(w):
        return functional_call(ours, {"weight": w}, (tokens,))

    def dense(w):
        return nn.functional.embedding(tokens, torch.where(is_active, w, w.detach()))

    for transform in (
        lambda f: torch.func.grad(loss(f))(table),
        lambda f: torch.func.jvp(f, (table,), (table.cos(),))[1],
        lambda f: torch.func.jvp(torch.func.grad(loss(f)), (table,), (table.cos(),))[1],
        lambda f: torch.func.jacrev(f)(table),
    ):
        oracle.assert_close64(transform(frozen), transform(dense), 1e-12)
