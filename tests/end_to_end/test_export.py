"""torch.export of a converted model sees PyTorch's own operators only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support import oracle


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        nn.GroupNorm(2, 6),
        nn.Flatten(),
        nn.Linear(600, 8),
        nn.LayerNorm(8),
    )


def swin():
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=[2, 2],
        num_classes=5,
        stochastic_depth_prob=0.0,
    )


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.linear(x) * self.scale


def namespaces(program):
    """Where the operators of an exported program come from."""
    calls = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
    return {node.target.namespace for node in calls if hasattr(node.target, "namespace")}


MASKS = {
    "all": lambda k: [True] * k,
    "half": oracle.half,
    "none": lambda k: [False] * k,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_exported_model_is_plain_aten(mask, training, strict):
    plain = net().train(training)
    ours = neq.convert(copy.deepcopy(plain))
    for _, layer in named_neuron_layers(ours):
        layer.channels.set(MASKS[mask](len(layer.channels)))
    x = torch.randn(2, 3, 5, 5)
    program = torch.export.export(ours, (x,), strict=strict)
    assert namespaces(program) == {"aten"}
    assert namespaces(program.run_decompositions()) == {"aten"}
    assert torch.equal(program.module()(x), plain(x))


@pytest.mark.parametrize(("make", "shape"), [(swin, (2, 3, 16, 16)), (Scaled, (3, 4))])
@pytest.mark.parametrize("others", ["train", "follow"])
@pytest.mark.parametrize("mask", ["half", "none"])
def test_models_with_other_parameters_export(make, shape, others, mask):
    plain = make().eval()
    ours = neq.convert(copy.deepcopy(plain), others=others)
    for _, layer in named_neuron_layers(ours):
        layer.channels.set(MASKS[mask](len(layer.channels)))
    x = torch.randn(shape)
    program = torch.export.export(ours, (x,))
    assert namespaces(program) == {"aten"}
    assert torch.equal(program.module()(x), plain(x))


def test_exporting_leaves_the_model_as_it_was():
    ours = neq.convert(net())
    ours[0].channels.set([1, 3])
    generation, parameters = ours[0].channels.generation, dict(ours.named_parameters())
    x = torch.randn(2, 3, 5, 5)
    torch.export.export(ours, (x,))
    assert ours[0].channels.mask.tolist() == [False, True, False, True]
    assert ours[0].channels.generation == generation
    assert all(p is parameters[name] for name, p in ours.named_parameters())
    ours(x).sum().backward()
    oracle.assert_frozen_are_zero(ours[0].weight.grad, [False, True, False, True])


def test_batch_sizes_may_stay_open():
    plain = net().eval()
    ours = neq.convert(copy.deepcopy(plain))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ours, (torch.randn(4, 3, 5, 5),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 3, 5, 5)
    assert torch.equal(program.module()(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_traced_model_is_plain_too():
    plain = net().eval()
    ours = neq.convert(copy.deepcopy(plain))
    ours[0].channels.set([1, 3])
    x = torch.randn(2, 3, 5, 5)
    traced = torch.jit.trace(ours, x)
    assert "PythonOp" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), plain(x))
