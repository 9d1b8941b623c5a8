"""FLOP accounting against hand-worked counts, published figures and PyTorch's own counter."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import neq_kernels as neq
from benchmarks.common.models import build
from neq_kernels.layers.base import NeuronLayer
from neq_kernels.measure import flops


class Tiny(nn.Module):
    """conv (bias) -> batch norm -> conv (groups) -> linear, on 2x6x6 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=True)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, bias=False)
        self.head = nn.Linear(8 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.grouped(self.norm(self.conv(x))).flatten(1))


TINY_MACS = {
    "conv": 4 * 36 * (2 * 9 + 1),
    "norm": 2 * 4 * 36,
    "grouped": 8 * 9 * (1 * 9),
    "head": 72 * 5,
}


def rows(count: flops.FlopCount) -> dict[str, flops.LayerFlops]:
    return {layer.name: layer for layer in count.layers}


def test_hand_worked_counts_of_every_kind_of_layer():
    count = flops.count(Tiny(), torch.randn(1, 2, 6, 6))
    assert {layer.name: layer.macs for layer in count.layers} == TINY_MACS
    assert count.macs == sum(TINY_MACS.values())
    assert count.paper == 2 * count.macs
    assert rows(count)["grouped"].neurons == 8


def test_the_image_needs_no_gradient_and_a_bias_has_no_dgrad():
    layer = rows(flops.count(Tiny(), torch.randn(1, 2, 6, 6)))
    assert layer["conv"].dgrad_macs == 0
    assert layer["grouped"].dgrad_macs == TINY_MACS["grouped"]
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 4, 1, bias=True))
    second = rows(flops.count(model, torch.randn(1, 2, 5, 5)))["1"]
    assert second.macs == 4 * 25 * (3 + 1)
    assert second.dgrad_macs == 4 * 25 * 3
    assert second.wgrad_macs == second.macs


def test_totals_are_for_one_image_whatever_the_batch():
    model = Tiny()
    one, many = (flops.count(model, torch.randn(n, 2, 6, 6)) for n in (1, 7))
    assert one == many


def test_transposed_convolution_counts_by_its_input():
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=True)
    count = flops.count(layer, torch.randn(1, 4, 5, 5))
    assert count.macs == 4 * 25 * (3 * 9) + 6 * 11 * 11
    assert count.layers[0].neurons == 6


@pytest.mark.parametrize(
    ("name", "classes", "size", "options", "published"),
    [
        ("resnet32", 10, 32, {}, "138.94M"),
        ("torchvision:resnet18", 1000, 224, {}, "3.64G"),
        ("torchvision:swin_b", 1000, 224, {}, "30.28G"),
        ("torchvision:deeplabv3_resnet50", 21, 480, {"aux_loss": True}, "305.06G"),
    ],
)
def test_published_baselines_to_the_printed_digit(name, classes, size, options, published):
    with torch.device("meta"):
        model = build(name, classes, **options)
    count = flops.count(model, torch.empty(1, 3, size, size, device="meta"))
    assert flops.human(count.paper) == published
    assert count.not_called == ()


def test_swin_projections_called_functionally_are_counted():
    with torch.device("meta"):
        model = torchvision.models.swin_b()
    count = flops.count(model, torch.empty(1, 3, 224, 224, device="meta"))
    functional = [row for row in count.layers if row.name.endswith(("attn.qkv", "attn.proj"))]
    assert len(functional) == 2 * 24
    seen_by_module_hooks = count.paper - sum(2 * row.macs for row in functional)
    assert flops.human(seen_by_module_hooks) == "20.42G"


@pytest.mark.parametrize("name", ["resnet20", "torchvision:resnet18"])
def test_executed_equals_what_pytorch_counts_in_a_real_step(name):
    """Convolutions without bias or groups: PyTorch counts neither as the rule does."""
    model = build(name, 10)
    x = torch.randn(1, 3, 32, 32)
    count = flops.count(model.eval(), x)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    products = [layer for layer in count.layers if layer.kind != "norm"]
    ours = 2 * sum(layer.macs + layer.dgrad_macs + layer.wgrad_macs for layer in products)
    assert ours == counter.get_total_flops()


def test_a_prefix_without_gradients_has_neither_wgrad_nor_dgrad():
    model = Tiny()
    for layer in (model.conv, model.norm):
        layer.requires_grad_(False)
    count = flops.count(model, torch.randn(1, 2, 6, 6))
    layer = rows(count)
    assert layer["norm"].dgrad_macs == layer["norm"].wgrad_macs == 0
    assert layer["conv"].wgrad_macs == 0
    assert layer["grouped"].dgrad_macs == 0
    assert layer["grouped"].wgrad_macs == TINY_MACS["grouped"]
    assert layer["head"].dgrad_macs == TINY_MACS["head"]
    assert count.paper == 2 * (TINY_MACS["grouped"] + TINY_MACS["head"])
    assert count.executed == count.forward + count.dgrad + count.wgrad
    assert flops.frozen_fraction(model, count) == 0, "what cannot learn is no saving of ours"
    neq.convert(model).head.channels.set([])
    learning = TINY_MACS["grouped"] + TINY_MACS["head"]
    assert flops.frozen_fraction(model, count) == pytest.approx(TINY_MACS["head"] / learning)


@pytest.mark.parametrize("separate", [False, True])
def test_multi_head_attention_projections_are_counted(separate):
    sizes = {"kdim": 6, "vdim": 10} if separate else {}
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = layer

        def forward(self, x):
            key, value = (x[..., :6], x.repeat(1, 1, 2)[..., :10]) if separate else (x, x)
            return self.attention(x, key, value)[0]

    count = flops.count(Attend(), torch.randn(2, 5, 8))
    layer_macs = {row.name: row.macs for row in count.layers}
    in_features = 8 + 6 + 10 if separate else 3 * 8
    assert layer_macs == {
        "attention.in_proj": 5 * in_features * 8,
        "attention.out_proj": 5 * 8 * 8,
    }
    assert rows(count)["attention.in_proj"].dgrad_macs == 0
    assert rows(count)["attention.out_proj"].dgrad_macs == 5 * 8 * 8


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
@pytest.mark.parametrize("separate", [False, True])
def test_attention_with_neurons_counts_as_the_plain_one(lengths, separate):
    sizes = {"kdim": 6, "vdim": 10} if separate else {}
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    length, source = lengths
    example = {
        "query": torch.randn(2, length, 8),
        "key": torch.randn(2, source, sizes.get("kdim", 8)),
        "value": torch.randn(2, source, sizes.get("vdim", 8)),
    }
    plain = flops.count(layer, example)
    model = neq.convert(layer)
    count = flops.count(model, example)
    for total in ("macs", "paper", "wgrad", "dgrad"):
        assert getattr(count, total) == getattr(plain, total)
    assert count.owned == 1
    assert plain.owned == 0
    model.channels.set([])
    count = flops.count(model, example)
    out = rows(count)["out_proj"].macs
    assert count.wgrad == 2 * out
    assert flops.frozen_fraction(model, count) == pytest.approx(1 - out / count.macs)


def test_a_layer_called_twice_counts_twice_under_one_name():
    layer = nn.Linear(4, 4, bias=False)
    count = flops.count(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(1, 4))
    assert [(row.name, row.calls, row.macs) for row in count.layers] == [("0", 2, 32)]
    assert count.layers[0].dgrad_macs == 16


def test_layers_that_do_not_run_are_named():
    model = Tiny()
    model.auxiliary = nn.Linear(3, 3)
    assert flops.count(model, torch.randn(1, 2, 6, 6)).not_called == ("auxiliary",)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    flops.count(model, torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(4), expected)
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_wrapped_models_are_seen_through():
    model = Tiny()
    x = torch.randn(1, 2, 6, 6)
    assert flops.count(torch.compile(model), x) == flops.count(model, x)
    assert flops.frozen_fraction(torch.compile(model), flops.count(model, x)) == 0


@pytest.mark.parametrize("example", [lambda x: (x, torch.tensor(3)), lambda x: {"x": x}])
def test_examples_as_a_loader_gives_them(example):
    x = torch.randn(2, 2, 6, 6)
    assert flops.count(Tiny(), example(x)) == flops.count(Tiny(), x)


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (3, TypeError, "example: expected a tensor"),
        (torch.empty(0, 2, 6, 6), ValueError, "non-empty"),
        ({"x": 3}, ValueError, "non-empty"),
    ],
)
def test_bad_examples_raise(example, error, message):
    with pytest.raises(error, match=message):
        flops.count(Tiny(), example)


def test_a_model_without_counted_layers_raises():
    with pytest.raises(ValueError, match="no convolution, linear or norm layer"):
        flops.count(nn.ReLU(), torch.randn(1, 2))


def test_unknown_convention_raises():
    count = flops.count(Tiny(), torch.randn(1, 2, 6, 6))
    assert count.total("paper") == count.paper
    assert count.total("executed") == count.executed
    with pytest.raises(ValueError, match="convention"):
        count.total("published")


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (1500, "1.50k"), (138937600, "138.94M"), (2e12, "2.00T")]
)
def test_human_figures(value, text):
    assert flops.human(value) == text


def freeze(model: nn.Module, active: dict[str, list[int]]) -> nn.Module:
    neq.convert(model)
    for name, neurons in active.items():
        model.get_submodule(name).channels.set(neurons)
    return model


def test_masks_decide_wgrad_and_the_paper_figure():
    x = torch.randn(1, 2, 6, 6)
    model = freeze(Tiny(), {"conv": [0, 3], "norm": [1], "grouped": [0], "head": [0, 1, 2, 3]})
    count = flops.count(model, x)
    layer = rows(count)
    shares = {"conv": 2 / 4, "norm": 1 / 4, "grouped": 1 / 8, "head": 4 / 5}
    assert {name: row.active_share for name, row in layer.items()} == shares
    assert {name: row.macs for name, row in layer.items()} == TINY_MACS
    for name in ("conv", "grouped", "head"):
        assert layer[name].wgrad_macs == TINY_MACS[name] * shares[name]
    assert layer["norm"].wgrad_macs == TINY_MACS["norm"]
    active = sum(TINY_MACS[name] * share for name, share in shares.items())
    assert count.paper == pytest.approx(2 * active)
    assert flops.frozen_fraction(model, count) == pytest.approx(1 - active / count.macs)


def test_frozen_fraction_follows_the_masks_without_counting_again():
    model = neq.convert(Tiny())
    count = flops.count(model, torch.randn(1, 2, 6, 6))
    assert flops.frozen_fraction(model, count) == 0
    model.head.channels.set([])
    assert flops.frozen_fraction(model, count) == pytest.approx(TINY_MACS["head"] / count.macs)


def test_a_count_keeps_the_masks_of_its_moment_out_of_json():
    model = freeze(Tiny(), {"conv": [1], "head": [0]})
    model.grouped.weight.requires_grad_(False)
    count = flops.count(model, torch.randn(1, 2, 6, 6))
    assert model.conv.channels.n_active == 1
    model.conv.channels.reset()
    assert count.masks["conv"].nonzero().tolist() == [[1]]
    assert count.masks.keys() == {"conv", "norm", "head"}
    saved = json.loads(json.dumps(count.to_dict()))
    assert "masks" not in saved
    assert saved["layers"][0]["active"] == 1


def test_dgrad_stops_below_a_wholly_frozen_prefix_and_only_there():
    x = torch.randn(1, 2, 6, 6)
    prefix = rows(flops.count(freeze(Tiny(), {"conv": [], "norm": []}), x))
    assert [row.dgrad_macs for row in prefix.values()] == [0, 0, 0, TINY_MACS["head"]]
    assert prefix["conv"].wgrad_macs == prefix["norm"].wgrad_macs == 0
    middle = rows(flops.count(freeze(Tiny(), {"norm": [], "grouped": []}), x))
    assert middle["norm"].dgrad_macs == TINY_MACS["norm"]
    assert middle["grouped"].dgrad_macs == TINY_MACS["grouped"]
    assert middle["grouped"].wgrad_macs == middle["norm"].wgrad_macs == 0


def test_the_approximate_mode_propagates_active_channels_only():
    model = neq.convert(Tiny(), grad_input="active")
    model.grouped.channels.set([0, 1])
    layer = rows(flops.count(model, torch.randn(1, 2, 6, 6)))
    assert layer["grouped"].dgrad_macs == TINY_MACS["grouped"] / 4


@pytest.mark.parametrize("name", ["resnet20", "torchvision:swin_t"])
def test_a_converted_model_counts_as_the_plain_one(name):
    model = build(name, 10)
    x = torch.randn(1, 3, 32, 32)
    assert flops.count(neq.convert(copy.deepcopy(model)), x) == flops.count(model, x)


def test_half_the_neurons_of_every_layer_are_half_the_paper_figure():
    model = neq.convert(build("resnet20"))
    x = torch.randn(1, 3, 32, 32)
    dense = flops.count(model, x).paper
    for layer in model.modules():
        if isinstance(layer, NeuronLayer):
            layer.channels.set(range(len(layer.channels) // 2))
    assert flops.count(model, x).paper == pytest.approx(dense / 2)


def test_a_model_that_casts_by_itself_counts_the_same():
    class Casting(Tiny):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    x = torch.randn(1, 2, 6, 6)
    plain, converted = Casting(), neq.convert(Casting())
    assert flops.count(converted, x) == flops.count(plain, x) == flops.count(Tiny(), x)
