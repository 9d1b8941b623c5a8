"""convert, revert, conversion_report, verify, and parameters that follow."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    SwinTransformer,
    SwinTransformerBlockV2,
)

import neq_kernels as neq
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.traversal import following_parameters, named_neuron_layers, neuron_owners
from tests.support import oracle

STOCK = [
    nn.Linear(3, 4),
    nn.Conv1d(3, 4, 2),
    nn.Conv2d(3, 4, 2),
    nn.Conv3d(3, 4, 2),
    nn.ConvTranspose1d(3, 4, 2),
    nn.ConvTranspose2d(3, 4, 2),
    nn.ConvTranspose3d(3, 4, 2),
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.BatchNorm3d(4),
    nn.GroupNorm(2, 4),
    nn.LayerNorm(4),
]


def entries(model):
    return {entry.name: entry for entry in neq.conversion_report(model).modules}


def converted(model):
    return [name for name, _ in named_neuron_layers(model)]


# --- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", STOCK, ids=lambda layer: type(layer).__name__)
def test_each_stock_type_keeps_its_identity(layer):
    layer = copy.deepcopy(layer)
    before, stock = dict(layer.named_parameters()), type(layer)
    assert neq.convert(layer) is layer
    assert isinstance(layer, NeuronLayer)
    assert isinstance(layer, stock)
    assert type(layer).__name__ == stock.__name__
    assert dict(layer.named_parameters()) == before
    assert all(p is before[n] for n, p in layer.named_parameters())
    assert len(layer.channels) == layer.channels.n_active == 4
    assert neq.revert(layer) is layer
    assert type(layer) is stock


class OwnLinear(nn.Linear):
    pass


LEFT_ALONE = {
    "a subclass of Linear": lambda: OwnLinear(3, 4),
    "a subclass of BatchNorm2d": lambda: type("OwnNorm", (nn.BatchNorm2d,), {})(3),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "parametrized by spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
    "its weight is computed": lambda: prune.l1_unstructured(nn.Linear(3, 4), "weight", 2),
    "its weight is computed by weight norm": lambda: weight_norm(nn.Linear(3, 4)),
    "its weight is computed by spectral norm": lambda: spectral_norm(nn.Linear(3, 4)),
    "it normalises over more than one dimension": lambda: nn.LayerNorm([3, 4]),
    "its weight is torch.complex64": lambda: nn.Linear(3, 4, dtype=torch.complex64),
    "its weight is empty": lambda: nn.Linear(0, 4),
    "not a supported layer type": lambda: nn.Bilinear(3, 3, 4),
    "not a supported layer type: embeddings": lambda: nn.Embedding(3, 4),
    "not a supported layer type: instance norm": lambda: nn.InstanceNorm2d(3, affine=True),
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


def test_a_weight_tied_to_an_embedding_stays_dense():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: neq.convert(nn.ReLU()), ValueError, "at least one layer that can be converted"),
        (
            lambda: neq.convert(nn.Sequential(OwnLinear(3, 4))),
            ValueError,
            r"(?s)got none:.*0 +OwnLinear +not converted: a subclass of Linear",
        ),
        (lambda: neq.convert(nn.Linear(3, 4), filter=lambda *_: False), ValueError, "got none"),
        (lambda: neq.convert(torch.ones(3)), TypeError, r"model: expected .*Module, got Tensor"),
        (lambda: neq.convert(nn.Linear(3, 4), grad_input="all"), ValueError, "grad_input: .*'all'"),
        (lambda: neq.convert(nn.Linear(3, 4), others="stop"), ValueError, "others: .*'stop'"),
        (lambda: neq.verify(nn.Linear(3, 4), torch.ones(2, 3)), ValueError, "call convert"),
        (lambda: neq.specialize(nn.Linear(3, 4)), ValueError, "call convert"),
    ],
)
def test_bad_calls_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refused_model_is_left_as_it_was():
    model = nn.Sequential(OwnLinear(3, 4), nn.Linear(4, 4))
    for options in ({"filter": lambda *_: False}, {"grad_input": "some"}, {"others": "none"}):
        with pytest.raises(ValueError):
            neq.convert(model, **options)
        assert [type(m) for m in model] == [OwnLinear, nn.Linear]
        assert [set(vars(m)) for m in model] == [set(vars(nn.Linear(3, 4)))] * 2


# --- converting twice, and back ------------------------------------------------------------------


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )


def test_converting_twice_does_nothing():
    model = neq.convert(small_net())
    model[0].channels.set([1, 2])
    before = [(m, type(m), getattr(m, "channels", None)) for m in model.modules()]
    neq.convert(model, grad_input="active")
    after = [(m, type(m), getattr(m, "channels", None)) for m in model.modules()]
    assert all(
        a is b for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert model[0].channels.n_active == 2
    assert model[0].grad_input == "exact"


def test_converting_twice_with_followers_does_nothing():
    model = neq.convert(Scaled(), others="follow")
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    neq.convert(model, others="follow")
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_what_is_added_later_is_converted_later():
    model = neq.convert(small_net())
    first = model[0].channels
    model.append(nn.Linear(5, 3))
    assert entries(model)["5"].reason == "convert was not called, or left it out"
    neq.convert(model)
    assert converted(model) == ["0", "1", "4", "5"]
    assert model[0].channels is first


@pytest.mark.parametrize("others", ["train", "follow"])
def test_revert_leaves_nothing_behind(others):
    plain = nn.Sequential(Scaled(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    state = [dict(vars(m)) for m in plain.modules()]
    types = [type(m) for m in plain.modules()]
    neq.convert(plain, others=others)
    plain[2].channels.set([])
    neq.revert(plain)
    assert [type(m) for m in plain.modules()] == types
    for module, before in zip(plain.modules(), state, strict=True):
        assert set(vars(module)) == set(before)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
    plain(torch.randn(3, 4)).square().sum().backward()
    assert bool(plain[2].weight.grad.ne(0).any())
    neq.revert(plain)


def test_hooks_optimizers_and_references_survive():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    conv, weight, calls = model[0], model[0].weight, []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    weight.register_post_accumulate_grad_hook(lambda _: calls.append("gradient"))
    x = torch.randn(2, 3, 5, 5)
    model(x).sum().backward()
    optimizer.step()
    buffer = optimizer.state[weight]["momentum_buffer"]
    neq.convert(model)
    assert model[0] is conv
    assert conv.weight is weight
    for _ in range(2):
        calls.clear()
        optimizer.zero_grad()
        model(x).sum().backward()
        assert calls == ["before", "forward", "gradient"]
        assert weight.grad is not None
        optimizer.step()
        assert optimizer.state[weight]["momentum_buffer"] is buffer
        neq.revert(model)


def test_a_layer_parametrized_after_its_conversion():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    parametrizations.weight_norm(model[0])
    assert entries(model)["0"].converted
    model[0].channels.set([1])
    model(torch.randn(2, 3)).sum().backward()
    oracle.assert_frozen_are_zero(model[0].bias.grad, [False, True, False, False])
    with pytest.raises(ValueError, match="0: expected the class that convert gave it, got Param"):
        neq.revert(model)
    assert all(isinstance(layer, NeuronLayer) for layer in model)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    neq.revert(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]


def test_a_filtered_second_convert_keeps_the_first():
    model = neq.convert(small_net(), filter=lambda name, _: name == "0")
    model[0].channels.set([3])
    neq.convert(model, filter=lambda name, _: name == "4")
    assert converted(model) == ["0", "4"]
    assert model[0].channels.n_active == 1


# --- real models ---------------------------------------------------------------------------------


def tiny_swin(**options):
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=5,
        stochastic_depth_prob=0.2,
        dropout=0.1,
        **options,
    )


def tiny_vit():
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20,
        num_classes=5,
    )  # fmt: skip


def tiny_convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], num_classes=5)


def tiny_deeplab():
    """ResNet-18 with dilations in place of strides, DeepLab's own heads, an auxiliary one too."""
    backbone = torchvision.models.resnet18()
    stages = nn.Sequential(*list(backbone.children())[:6])
    head = torchvision.models.segmentation.deeplabv3.DeepLabHead(128, 5, (2, 3))
    features = torchvision.models._utils.IntermediateLayerGetter(stages, {"4": "aux", "5": "out"})
    aux = torchvision.models.segmentation.fcn.FCNHead(64, 5)
    return DeepLabV3(features, head, aux)


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), 32),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), 32),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 32),
    "convnext": (tiny_convnext, 32),
    "vit": (tiny_vit, 16),
    "swin": (tiny_swin, 36),
    "deeplab": (tiny_deeplab, 32),
}


def output_of(model, x, seed=0):
    torch.manual_seed(seed)
    out = model(x)
    return torch.cat([o.flatten() for o in out.values()]) if isinstance(out, dict) else out


def set_ragged(model, shift=0):
    for _, layer in named_neuron_layers(model):
        k = len(layer.channels)
        layer.channels.set([(i + shift) % 3 != 1 for i in range(k)])


def assert_model_gradients(ours, plain):
    owners = neuron_owners(ours)
    for (name, parameter), dense in zip(ours.named_parameters(), plain.parameters(), strict=True):
        exact = dense.grad
        if parameter in owners:
            ((channels, layout),) = owners[parameter]
            exact = exact.clone()
            layout.fill_(exact, channels.frozen, 0)
            assert bool((layout.gather(parameter.grad, channels.frozen) == 0).all()), name
        oracle.assert_close64(parameter.grad, exact, 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_they_did_and_mask_their_gradients(name):
    make, size = MODELS[name]
    plain = make().double()
    ours = neq.convert(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict())
    set_ragged(ours)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    outs = [output_of(model, x) for model in (plain, ours)]
    assert torch.equal(*outs)
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)
    assert_model_gradients(ours, plain)
    neq.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "deeplab"])
def test_every_parameter_of_a_convolutional_net_is_owned(name):
    make, size = MODELS[name]
    model = neq.convert(make())
    assert set(neuron_owners(model)) == set(model.parameters())
    assert neq.conversion_report(model).others == ()
    assert neq.verify(model, torch.randn(2, 3, size, size)) == []


def test_swin_masks_every_row_of_its_attention():
    """torchvision's attention uses its weights without calling the layers; ours calls them."""
    model = tiny_swin()
    plain = copy.deepcopy(model)
    assert {"qkv", "proj"} <= {n.split(".")[-1] for n in converted(neq.convert(model))}
    attention = [m for m in model.modules() if isinstance(m, ShiftedWindowAttention)]
    assert len(attention) == 4
    assert all(type(m) is not ShiftedWindowAttention for m in attention)
    for block in attention:
        block.qkv.channels.set([1, 7])
        block.proj.channels.set([0])
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for block in attention:
        for layer, rows in ((block.qkv, [1, 7]), (block.proj, [0])):
            mask = [i in rows for i in range(len(layer.channels))]
            oracle.assert_frozen_are_zero(layer.weight.grad, mask)
            oracle.assert_frozen_are_zero(layer.bias.grad, mask)
            assert bool(layer.weight.grad[rows].ne(0).any())
    tables = [n for n, _ in model.named_parameters() if n.endswith("position_bias_table")]
    assert neq.verify(model, torch.randn(2, 3, 32, 32)) == tables
    assert [e.name for e in neq.conversion_report(model).others] == tables
    neq.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("size", [16, 20, 24, 36])
@pytest.mark.parametrize("training", [True, False])
def test_swin_is_torchvisions_bit_for_bit(size, training):
    """Windows as large as the image, images that need padding, shifted windows, dropout."""
    plain = tiny_swin(attention_dropout=0.1).train(training)
    ours = neq.convert(copy.deepcopy(plain))
    x = torch.randn(2, 3, size, size + 4)
    assert torch.equal(output_of(ours, x), output_of(plain, x))


def test_swin_v2_is_left_alone_and_says_so():
    model = tiny_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    neq.convert(model)
    reasons = {e.name: e.reason for e in neq.conversion_report(model).modules if not e.converted}
    assert all("uses its weight without calling it" in r for n, r in reasons.items() if "qkv" in n)
    assert any(n.endswith("attn.qkv") for n in reasons)
    dense = neq.verify(model, torch.randn(2, 3, 32, 32))
    assert any(name.endswith("attn.qkv.weight") for name in dense)
    assert not any(".mlp." in name for name in dense)


# --- multi-head attention ------------------------------------------------------------------------


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_multi_head_attention_is_reported_and_dense():
    plain = Attentive().double()
    ours = neq.convert(copy.deepcopy(plain))
    assert converted(ours) == ["head"]
    inside = "attention."
    names = [
        inside + n for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]
    assert "MultiheadAttention uses its weight" in entries(ours)["attention.out_proj"].reason
    assert [e.name for e in neq.conversion_report(ours).others] == names
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert neq.verify(ours, x) == names
    ours.head.channels.set([1])
    for model in (plain, ours):
        model(x).square().sum().backward()
    assert_model_gradients(ours, plain)


class Block(nn.Module):
    """Attention whose every parameter follows the linear layer beside it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.attention(x, key=x, value=x, need_weights=False)[0])


def frozen_blocks():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 3)).double()
    ours = neq.convert(copy.deepcopy(plain), others="follow")
    freeze(ours, but=["2"])
    plain[1].requires_grad_(False)
    return plain, ours


def test_frozen_attention_that_no_gradient_reaches_runs_in_no_grad():
    _, ours = frozen_blocks()
    seen = []
    ours[1].attention.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with oracle.CalledOps() as called:
        out = ours(torch.randn(2, 5, 8, dtype=torch.float64))
    assert torch.is_grad_enabled()
    assert seen == [False]
    assert "bmm" not in called.names  # PyTorch's way to project a batch-first input
    out.sum().backward()
    assert [n for n, p in ours.named_parameters() if p.grad is not None] == ["2.weight", "2.bias"]


def test_frozen_attention_hands_a_gradient_down():
    plain, ours = frozen_blocks()
    ours[0].channels.reset()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for model in (plain, ours):
        model(x).square().sum().backward()
    for expected, parameter in zip(plain.parameters(), ours.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            oracle.assert_close64(parameter.grad, expected.grad, 1e-9)


def test_frozen_attention_that_raises_leaves_grad_mode_on():
    _, ours = frozen_blocks()
    with pytest.raises((RuntimeError, AssertionError)):
        ours[1](torch.randn(2, 5, 7, dtype=torch.float64))
    assert torch.is_grad_enabled()
    ours[1].linear.channels.reset()
    ours(torch.randn(2, 5, 8, dtype=torch.float64)).sum().backward()
    assert ours[1].attention.in_proj_weight.grad is not None


# --- verify --------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Uses one layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.called, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.bypassed.weight, self.bypassed.bias)


def test_verify_finds_layers_that_are_bypassed():
    assert neq.verify(neq.convert(Functional()), torch.randn(3, 4)) == [
        "bypassed.weight",
        "bypassed.bias",
    ]


@pytest.mark.parametrize(
    "example", [torch.randn(3, 4), (torch.randn(3, 4),), {"x": torch.randn(3, 4)}]
)
def test_verify_takes_tensors_tuples_and_dicts(example):
    assert len(neq.verify(neq.convert(Functional()), example)) == 2


def test_verify_needs_something_to_learn():
    model = neq.convert(nn.Linear(3, 4)).requires_grad_(False)
    with pytest.raises(ValueError, match="output that needs a gradient, got none"):
        neq.verify(model, torch.randn(2, 3))


def test_verify_works_with_gradients_off():
    with torch.no_grad():
        assert neq.verify(neq.convert(nn.Linear(3, 4)), torch.randn(2, 3)) == []


@pytest.mark.parametrize("fails", [False, True])
def test_verify_leaves_everything_as_it_was(fails):
    model = neq.convert(small_net())
    model.insert(3, nn.Dropout(0.5))
    model[0].channels.set([])
    model[1].eval()
    x, misfit = torch.randn(2, 3, 5, 5), torch.randn(2, 7, 5, 5)
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    buffers = [b.clone() for b in model.buffers()]
    masks = [layer.channels.mask for _, layer in named_neuron_layers(model)]
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            neq.verify(model, misfit)
    else:
        assert neq.verify(model, x) == []
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    for layer, mask in zip((m for _, m in named_neuron_layers(model)), masks, strict=True):
        assert torch.equal(layer.channels.mask, mask)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, before)
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)


# --- others="follow" -----------------------------------------------------------------------------


class Scaled(nn.Module):
    """A linear layer with a scale no neuron owns."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        if x.shape[-1] != 4:
            raise ArithmeticError("on purpose")
        return self.linear(x) * self.scale


def freeze(model, but=()):
    for name, layer in named_neuron_layers(model):
        if name not in but:
            layer.channels.set([])


def test_followers_stop_and_start_with_their_block():
    model = neq.convert(nn.Sequential(Scaled(), Scaled(), nn.Linear(4, 2)), others="follow")
    x = torch.randn(3, 4)

    def learned():
        model.zero_grad()
        model(x).square().sum().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None}

    everything = {name for name, _ in model.named_parameters()}
    assert learned() == everything
    model[0].linear.channels.set([])
    assert learned() == everything - {"0.linear.weight", "0.linear.bias", "0.scale"}
    model[0].linear.channels.set([2])
    assert learned() == everything
    freeze(model, but=["2"])
    assert learned() == {"2.weight", "2.bias"}


def test_without_follow_they_keep_backprop_alive():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)))
    freeze(model)
    out = model(torch.randn(3, 4))
    assert out.requires_grad
    out.sum().backward()
    assert model[0].scale.grad is not None
    (other,) = neq.conversion_report(model).others
    assert other.name == "0.scale"
    assert "keeps backprop alive" in other.reason


def test_the_report_says_who_follows():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    (other,) = neq.conversion_report(model).others
    assert other.name == "0.scale"
    assert "follows its block" in other.reason
    (following,) = following_parameters(model)
    assert following.parameters == [model[0].scale]


def test_a_forward_that_raises_leaves_parameters_in_place():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    scale = model[0].scale
    model[0].linear.channels.set([])
    with pytest.raises(ArithmeticError):
        model(torch.randn(3, 5))
    assert model[0].scale is scale
    assert dict(model.named_parameters())["0.scale"] is scale
    model[0].linear.channels.reset()
    model(torch.randn(3, 4)).sum().backward()
    assert scale.grad is not None


def test_parameters_are_themselves_after_every_forward():
    model = neq.convert(tiny_vit(), others="follow").train()
    before = dict(model.named_parameters())
    freeze(model)
    model(torch.randn(2, 3, 16, 16))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == list(tiny_vit().state_dict())


@pytest.mark.parametrize(
    ("make", "size", "head", "lowest"),
    [
        (tiny_vit, 16, "heads.head", "heads.head"),
        (tiny_swin, 32, "head", "head"),
        # Its norm is a subclass, so no neuron owns it, and follows the head it sits beside.
        (tiny_convnext, 32, "classifier.2", "classifier.0"),
    ],
)
def test_everything_frozen_but_the_head_stops_backprop_there(make, size, head, lowest):
    model = neq.convert(make(), others="follow")
    assert head in converted(model)
    freeze(model, but=[head])
    seen = []
    model.get_submodule(lowest).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].requires_grad)
    )
    model(torch.randn(2, 3, size, size)).sum().backward()
    assert seen == [False]
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {f"{layer}.{p}" for layer in (head, lowest) for p in ("weight", "bias")}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_follow_their_own_block(copied):
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    twin = copied(model)
    twin[0].linear.channels.set([])
    x = torch.randn(3, 4)
    for each in (model, twin):
        each(x).sum().backward()
    assert twin[0].scale.grad is None
    assert model[0].scale.grad is not None
    assert [f.parameters for f in following_parameters(twin)] == [[twin[0].scale]]
    neq.revert(twin)
    model[0].linear.channels.set([])
    model.zero_grad()
    model(x).sum().backward()
    assert model[0].scale.grad is None


@pytest.mark.parametrize("make", [tiny_vit, tiny_convnext, tiny_swin])
def test_followers_compute_what_they_did(make):
    size = 16 if make is tiny_vit else 32
    plain = make().double()
    ours = neq.convert(copy.deepcopy(plain), others="follow")
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert torch.equal(output_of(ours, x), output_of(plain, x))
    set_ragged(ours)
    outs = [output_of(model, x) for model in (plain, ours)]
    for out in outs:
        out.square().sum().backward()
    owners = neuron_owners(ours)
    for parameter, dense in zip(ours.parameters(), plain.parameters(), strict=True):
        exact = dense.grad.clone()
        for channels, layout in owners.get(parameter, ()):
            layout.fill_(exact, channels.frozen, 0)
        oracle.assert_close64(parameter.grad, exact, 1e-9)
    freeze(ours)
    assert torch.equal(output_of(ours.eval(), x), output_of(plain.eval(), x))


def test_nested_blocks_and_reused_blocks():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.gain = Scaled(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.block(self.block(x)) * self.gain

    model = neq.convert(nn.Sequential(Twice(), nn.Linear(4, 2)), others="follow")
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model[0].block.linear.channels.set([])
    model(x).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["1.weight", "1.bias"]


def test_a_mode_without_gradients_moves_nothing_aside():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    freeze(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        model(x)
    assert isinstance(model[0].scale, nn.Parameter)


def test_specialize_is_a_switch():
    model = small_net()
    neq.convert(model)
    assert neq.specialize(model) is model
    assert all(layer.specialized for _, layer in named_neuron_layers(model))
    neq.specialize(model, enabled=False)
    assert not any(layer.specialized for _, layer in named_neuron_layers(model))
