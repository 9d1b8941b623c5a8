"""The layers: PyTorch's own outputs, state and behaviour, with gradients of active neurons only."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import neq_kernels as neq
from neq_kernels.backends.problem import Strategy
from neq_kernels.channels import WHOLE_PARAMETER, NeuronLayout
from neq_kernels.dispatch.selection import selector
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners, unwrap
from tests.support import oracle
from tests.support.backends import cpu

# name: (how to make it, shape of an input)
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear 3d": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "linear 3d biased": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear vector": (lambda: nn.Linear(6, 5), (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d circular": (
        lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"),
        (2, 4, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2, bias=False), (2, 4, 7, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, (1, 3), groups=2), (2, 4, 7, 6)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 7, 6)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 6)),
    "conv2d reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
        (2, 4, 7, 6),
    ),
    "conv2d replicate": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
        (2, 4, 7, 6),
    ),
    "conv2d circular same": (
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="circular"),
        (2, 4, 7, 6),
    ),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 5, (2, 3, 1), padding=(1, 0, 0)), (2, 2, 4, 5, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        (2, 4, 5, 4),
    ),
    "conv_transpose2d grouped": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2, dilation=2),
        (2, 4, 5, 4),
    ),
    "conv_transpose2d unbatched": (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 5, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 5, 2, stride=2), (2, 2, 3, 2, 3)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(6), (5, 6)),
    "batch_norm1d sequence": (lambda: nn.BatchNorm1d(6), (5, 6, 4)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(6), (3, 6, 4, 4)),
    "batch_norm2d cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), (3, 6, 4, 4)),
    "batch_norm2d untracked": (
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        (3, 6, 4, 4),
    ),
    "batch_norm3d": (lambda: nn.BatchNorm3d(6), (3, 6, 2, 3, 2)),
    "group_norm": (lambda: nn.GroupNorm(3, 6), (3, 6, 4, 4)),
    "group_norm vector": (lambda: nn.GroupNorm(2, 6), (3, 6)),
    "layer_norm": (lambda: nn.LayerNorm(6), (3, 4, 6)),
    "layer_norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def twins(name, mask=None):
    """A plain layer in float64, its converted copy, and an input."""
    make, shape = LAYERS[name]
    plain = make().double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours = neq.convert(copy.deepcopy(plain))
    if mask is not None:
        ours.channels.set(mask(len(ours.channels)))
    return plain, ours, torch.randn(shape, dtype=torch.float64)


def layout_of(layer):
    """Keywords for the oracle: how to read neurons off this layer's weight."""
    if "Transpose" in type(layer).__name__:
        return {"transposed": True, "groups": layer.groups}
    return {}


def assert_masked(ours, plain):
    """ours.grad is plain.grad with frozen neurons zeroed."""
    mask = ours.channels.mask.tolist()
    for (name, parameter), dense in zip(ours.named_parameters(), plain.parameters(), strict=True):
        where = layout_of(ours) if name == "weight" else {}
        oracle.assert_close64(parameter.grad, oracle.zero_frozen(dense.grad, mask, **where), 1e-12)
        oracle.assert_frozen_are_zero(parameter.grad, mask, **where)


@every_layer
@pytest.mark.parametrize("mask", [oracle.ragged, oracle.half, lambda k: [True] * k])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_output_state_and_gradients(name, mask, training):
    plain, ours, x = twins(name, mask)
    plain.train(training)
    ours.train(training)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [layer(t) for layer, t in zip((plain, ours), inputs, strict=True)]
    assert torch.equal(*outs)
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)
    oracle.assert_close64(inputs[1].grad, inputs[0].grad, 1e-12)
    assert_masked(ours, plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@every_layer
def test_wholly_frozen(name):
    plain, ours, x = twins(name, lambda k: [False] * k)
    out = ours(x)
    assert torch.equal(out, plain(x))
    assert not out.requires_grad
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), "running statistics of a frozen norm layer go on"
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [layer(t) for layer, t in zip((plain, ours), inputs, strict=True)]
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)
    oracle.assert_close64(inputs[1].grad, inputs[0].grad, 1e-12)
    assert all(p.grad is None for p in ours.parameters())


@every_layer
def test_channel_dim_enumerates_the_neurons(name):
    """Moving one neuron's parameters moves its channel of the output, and no other."""
    _, ours, x = twins(name)
    ours.eval()
    before = ours(x).detach()
    dim = ours.channel_dim(before)
    k = len(ours.channels)
    assert before.shape[dim] == k
    chosen = torch.tensor([k // 2])
    with torch.no_grad():
        for parameter, layout in ours.neuron_parameters():
            layout.scatter_(parameter, chosen, layout.gather(parameter, chosen) + 1)
    moved = (ours(x) != before).movedim(dim, 0).unsqueeze(-1).flatten(1).any(1)
    assert moved.tolist() == [i == k // 2 for i in range(k)]


@every_layer
def test_neuron_parameters_are_the_parameters(name):
    _, ours, _ = twins(name)
    owned = ours.neuron_parameters()
    assert [p for p, _ in owned] == list(ours.parameters())
    assert all(layout.n_neurons(p) == len(ours.channels) for p, layout in owned)
    assert ours.is_norm == ("norm" in name)


@every_layer
def test_repr_adds_the_active_count(name):
    plain, ours, _ = twins(name, oracle.half)
    k = len(ours.channels)
    assert repr(ours) == f"{repr(plain)[:-1]}, active={(k + 1) // 2}/{k})"


@every_layer
def test_gradients_off(name):
    plain, ours, x = twins(name, oracle.half)
    with torch.no_grad():
        out = ours(x)
    assert torch.equal(out, plain(x))
    assert out.grad_fn is None


def calls_of_a_step(model, x):
    x = x.clone().requires_grad_()
    with oracle.CalledOps() as called:
        model(x).sum().backward()
    return called.that_compute()


@every_layer
@pytest.mark.usefixtures("stock_algorithms")
def test_with_everything_active_a_step_is_pytorchs_own_calls(name):
    plain, ours, x = twins(name)
    with selector.forced_strategy(Strategy.DENSE):
        assert calls_of_a_step(ours, x) == calls_of_a_step(plain, x)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="it needs the extension's kernel")
def test_with_everything_active_another_strategy_can_replace_the_library():
    plain, ours, x = twins("conv2d depthwise")
    with selector.forced_strategy(Strategy.CUSTOM):
        assert "conv_backward" in calls_of_a_step(ours, x)
        x.requires_grad_()
        for layer in (plain, ours):
            layer.zero_grad()
            (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            dx.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="it needs the extension's kernel")
def test_a_large_depthwise_convolution_is_served_by_its_own_kernel_at_any_mask():
    layer = neq.convert(nn.Conv2d(64, 64, 5, padding=2, groups=64))
    assert "conv_backward" in calls_of_a_step(layer, torch.randn(8, 64, 16, 16))


@every_layer
@pytest.mark.usefixtures("stock_algorithms")
def test_wholly_frozen_a_step_is_that_of_a_layer_that_needs_no_gradient(name):
    plain, ours, x = twins(name, lambda k: [False] * k)
    plain.requires_grad_(False)
    assert calls_of_a_step(ours, x) == calls_of_a_step(plain, x)


def test_masking_does_not_depend_on_the_mode():
    layer = neq.convert(nn.Linear(3, 4)).eval()
    layer.channels.set([1, 2])
    layer(torch.ones(2, 3)).sum().backward()
    oracle.assert_frozen_are_zero(layer.weight.grad, [False, True, True, False])
    assert bool(layer.weight.grad[1:3].ne(0).all())


@pytest.mark.parametrize("size", [None, [9, 7], [10, 8]])
def test_output_size_of_a_transposed_convolution(size):
    plain, ours, x = twins("conv_transpose2d", oracle.half)
    outs = [layer(x, size) for layer in (plain, ours)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_masked(ours, plain)
    with pytest.raises(ValueError, match="output size"):
        ours(x, [99, 99])


@pytest.mark.parametrize("learns", [(True, False), (False, True), (False, False)])
def test_requires_grad_of_single_parameters(learns):
    for make, shape in (LAYERS["linear"], LAYERS["conv2d grouped"], LAYERS["layer_norm"]):
        layer = neq.convert(make())
        layer.weight.requires_grad_(learns[0])
        layer.bias.requires_grad_(learns[1])
        layer.channels.set(oracle.half(len(layer.channels)))
        out = layer(torch.randn(shape))
        assert out.requires_grad == any(learns)
        if any(learns):
            out.sum().backward()
        for parameter, learned in zip((layer.weight, layer.bias), learns, strict=True):
            assert (parameter.grad is not None) == learned


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mask", [oracle.half, lambda k: [False] * k, lambda k: [True] * k])
def test_in_place_activations_follow(name, mask):
    plain, ours, x = twins(name, mask)
    k = len(ours.channels)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = []
    for layer, t in zip((plain, ours), inputs, strict=True):
        out = nn.functional.relu(layer(t).mul_(2), inplace=True)
        out.sum().backward()
        outs.append(out)
    assert torch.equal(*outs)
    oracle.assert_close64(inputs[1].grad, inputs[0].grad, 1e-12)
    if any(mask(k)):
        assert_masked(ours, plain)


@pytest.mark.parametrize(
    "name", ["conv2d", "conv2d grouped", "conv2d depthwise", "conv_transpose2d"]
)
def test_channels_last_models(name):
    plain, ours, x = twins(name, oracle.ragged)
    for layer in (plain, ours):
        layer.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    outs = [layer(x) for layer in (plain, ours)]
    assert torch.equal(*outs)
    assert outs[1].stride() == outs[0].stride()
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)
    assert_masked(ours, plain)
    for parameter in ours.parameters():
        assert parameter.grad.stride() == parameter.stride()


# --- copies, moves, checkpoints ------------------------------------------------------------------


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )


def frozen_net(**options):
    model = neq.convert(net(), **options)
    model[0].channels.set([0, 3])
    model[4].channels.set([])
    return model


def masks(model):
    return [layer.channels.mask.tolist() for _, layer in named_neuron_layers(model)]


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("others", ["train", "follow"])
def test_copies_are_equal_and_independent(copied, others):
    model = frozen_net(others=others)
    twin = copied(model)
    assert masks(twin) == masks(model)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(twin(x), model(x))
    twin[0].channels.set([1])
    twin[4].channels.reset()
    assert masks(model) == masks(frozen_net())
    twin(x).sum().backward()
    oracle.assert_frozen_are_zero(twin[0].weight.grad, [False, True, False, False])
    assert all(p.grad is None for p in model.parameters())


def test_checkpoints_go_both_ways():
    plain, ours = net(), frozen_net()
    x = torch.randn(2, 3, 5, 5)
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert ours.load_state_dict(plain.state_dict()) == plain.load_state_dict(plain.state_dict())
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    fresh = net().eval()
    assert str(fresh.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(ours(x), fresh(x))
    assert masks(ours) == masks(frozen_net()), "masks are no part of a checkpoint"


def test_channels_share_no_fate_with_dtype_and_device():
    model = frozen_net()
    order, generation = model[0].channels.order(), model[0].channels.generation
    model.double().half().to(torch.bfloat16).float()
    model.to("meta")
    model.to_empty(device="cpu")
    assert masks(model) == masks(frozen_net())
    assert model[0].channels.order() is order
    assert model[0].channels.generation == generation
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.eval()(torch.randn(2, 3, 5, 5)).sum()
    model[4].channels.reset()
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    oracle.assert_frozen_are_zero(model[0].weight.grad, [True, False, False, True])


def meta_step(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def test_a_training_step_on_the_meta_device():
    """Shapes without data, as FLOP and memory estimators use them. Active rows are counted."""
    with torch.device("meta"):
        plain, ours = net(), neq.convert(net())
        x = torch.randn(2, 3, 5, 5)
    dense = meta_step(plain, x)
    assert meta_step(ours, x) == dense
    ours[0].channels.set([0, 3])
    ours.zero_grad()
    half_of_the_wgrad = 2 * (2 * 9) * 2 * (3 * 9)
    assert meta_step(ours, x) == dense - half_of_the_wgrad
    assert all(p.grad.shape == p.shape for p in ours.parameters())


def test_a_training_step_on_fake_tensors():
    with FakeTensorMode():
        model = neq.convert(net())
        model(torch.randn(2, 3, 5, 5)).sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())


def test_parameters_may_be_replaced():
    layer = neq.convert(nn.Linear(3, 4))
    layer.channels.set([0, 2])
    layer.weight = nn.Parameter(torch.randn(4, 3))
    layer(torch.ones(2, 3)).sum().backward()
    oracle.assert_frozen_are_zero(layer.weight.grad, [True, False, True, False])
    assert [p for p, _ in layer.neuron_parameters()] == [layer.weight, layer.bias]


def test_functional_call_masks_the_tensors_it_is_given():
    model = frozen_net()
    model[4].channels.reset()
    replaced = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, replaced, torch.randn(2, 3, 5, 5)).sum().backward()
    oracle.assert_frozen_are_zero(replaced["0.weight"].grad, [True, False, False, True])
    assert bool(replaced["0.weight"].grad[0].ne(0).any())
    assert all(p.grad is None for p in model.parameters())


def test_functorch_over_a_converted_model():
    plain, ours = net().eval(), neq.convert(net()).eval()
    ours.load_state_dict(plain.state_dict())
    ours[0].channels.set([0, 3])
    x = torch.randn(4, 3, 5, 5)

    def per_sample(model):
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def loss(parameters, sample):
            return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    for ours_grad, dense in zip(per_sample(ours).values(), per_sample(plain).values(), strict=True):
        assert torch.equal(ours_grad, dense)


@pytest.mark.parametrize("mask", [lambda k: [True] * k, oracle.half])
def test_a_model_under_autocast(mask):
    plain = net()
    ours = neq.convert(copy.deepcopy(plain))
    for _, layer in named_neuron_layers(ours):
        layer.channels.set(mask(len(layer.channels)))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(8, 3, 5, 5)
    exact(x.double()).square().sum().backward()
    outs = []
    for model in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            out.float().square().sum().backward()
        outs.append(out)
    assert outs[1].dtype == torch.bfloat16
    assert torch.equal(*outs)
    owners = neuron_owners(ours)
    for parameter, low, true in zip(
        ours.parameters(), plain.parameters(), exact.parameters(), strict=True
    ):
        ((channels, _),) = owners[parameter]
        frozen = channels.mask.tolist()
        assert parameter.grad.dtype == torch.float32
        oracle.assert_frozen_are_zero(parameter.grad, frozen)
        oracle.assert_within_dtype_rule(
            parameter.grad.bfloat16(),
            oracle.zero_frozen(low.grad, frozen).bfloat16(),
            oracle.zero_frozen(true.grad, frozen),
        )


# --- sharing -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers, one weight; each has its own bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, through_a_file])
def test_layers_that_share_a_weight_share_their_channels(copied):
    plain = Tied().double()
    ours = copied(neq.convert(copy.deepcopy(plain)))
    assert ours.first.channels is ours.second.channels
    assert ours.first.weight is ours.second.weight
    mask = [True, False, False, True]
    ours.first.channels.set(mask)
    x = torch.randn(3, 4, dtype=torch.float64)
    for model in (plain, ours):
        model(x).square().sum().backward()
    for parameter, dense in zip(ours.parameters(), plain.parameters(), strict=True):
        oracle.assert_close64(parameter.grad, oracle.zero_frozen(dense.grad, mask), 1e-12)
        oracle.assert_frozen_are_zero(parameter.grad, mask)


def test_one_layer_called_twice():
    plain = nn.Linear(4, 4).double()
    ours = neq.convert(copy.deepcopy(plain))
    ours.channels.set([0, 3])
    x = torch.randn(3, 4, dtype=torch.float64)
    for layer in (plain, ours):
        layer(layer(x)).square().sum().backward()
    assert_masked(ours, plain)


def test_a_layer_tied_to_one_left_alone_is_left_alone():
    """Its weight gets a dense gradient from the other one, whatever its own mask."""
    model = nn.Sequential(Tied(), nn.Linear(4, 2))
    neq.convert(model, filter=lambda name, _: name != "0.second")
    assert [name for name, _ in named_neuron_layers(model)] == ["1"]
    neq.convert(model)
    assert model[0].first.channels is model[0].second.channels


# --- looking around ------------------------------------------------------------------------------


def test_named_neuron_layers_in_order_through_wrappers():
    model = neq.convert(net())
    expected = [("0", model[0]), ("1", model[1]), ("4", model[4])]
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        assert unwrap(wrapped) is model
        assert list(named_neuron_layers(wrapped)) == expected
    assert list(named_neuron_layers(net())) == []


def test_neuron_owners_name_every_owned_parameter():
    model = neq.convert(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.GroupNorm(2, 6))
    )
    owners = neuron_owners(model)
    assert list(owners) == list(model.parameters())
    rows = NeuronLayout()
    layouts = [rows, rows, NeuronLayout(2, axis=1), rows, rows, rows]
    channels = [m.channels for m in model for _ in range(2)]
    assert list(owners.values()) == [[pair] for pair in zip(channels, layouts, strict=True)]


def test_neuron_owners_of_a_tied_weight():
    model = neq.convert(Tied())
    owners = neuron_owners(model)
    assert owners[model.first.weight] == [(model.first.channels, NeuronLayout())]
    assert len(owners) == 3


def test_neuron_owners_know_the_parameters_that_follow():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.linear(x) * self.scale

    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(3, 2)), others="follow")
    owners = neuron_owners(model)
    ((channels, layout),) = owners[model[0].scale]
    assert layout == WHOLE_PARAMETER
    assert channels.n_active == 1
    model[0].linear.channels.set([])
    assert neuron_owners(model)[model[0].scale][0][0].n_active == 0


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("before", [lambda k: [True] * k, oracle.half])
def test_a_change_between_forward_and_backward_raises(name, before):
    make, shape = LAYERS[name]
    layer = neq.convert(make())
    k = len(layer.channels)
    layer.channels.set(before(k))
    out = nn.functional.relu(layer(torch.randn(shape)), inplace=True)
    noticed_by_autograd = layer.is_norm and layer.channels.n_active < k
    layer.channels.set([0])
    message = "changed between its forward and its backward"
    if noticed_by_autograd:
        message = "modified by an inplace operation.*Bool"
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()
