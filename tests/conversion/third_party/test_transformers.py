"""transformers' own layers have neurons, and compute what they did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    NemotronHConfig,
    XLNetConfig,
)
from transformers.models.convbert.modeling_convbert import GroupedLinearLayer
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.deberta.modeling_deberta import DebertaLayerNorm
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextExperts
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.squeezebert.modeling_squeezebert import SqueezeBertLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.xlnet.modeling_xlnet import XLNetModel
from transformers.pytorch_utils import Conv1D

import neq_kernels as neq
from neq_kernels.channels import NeuronLayout
from neq_kernels.layers.linear import TransposedLinear
from neq_kernels.layers.traversal import neuron_owners
from tests.support.models import entries
from tests.support.third_party import assert_holds

ROWS, PICTURE = (2, 5, 6), (2, 6, 3, 4)

LAYERS = {
    "Conv1D": (lambda: Conv1D(5, 6), ROWS),
    "LlamaRMSNorm": (lambda: LlamaRMSNorm(6), ROWS),
    "T5LayerNorm": (lambda: T5LayerNorm(6), ROWS),
    "MambaRMSNormGated": (lambda: MambaRMSNormGated(6, 3), ROWS),
    "DebertaLayerNorm": (lambda: DebertaLayerNorm(6), ROWS),
    "ConvNextLayerNorm": (lambda: ConvNextLayerNorm(6), ROWS),
    "ConvNextLayerNorm first": (
        lambda: ConvNextLayerNorm(6, data_format="channels_first"),
        PICTURE,
    ),
    "SqueezeBertLayerNorm": (lambda: SqueezeBertLayerNorm(6), (2, 6, 5)),
    "GroupedLinearLayer": (lambda: GroupedLinearLayer(6, 4, 2), ROWS),
    "FalconLinear": (lambda: FalconLinear(6, 5), ROWS),
}


def filled(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    make, shape = LAYERS[name]
    plain = filled(make().double())
    x = torch.randn(shape, dtype=torch.float64)
    layer = neq.convert(assert_holds(plain, x))
    channels_first = "first" in name or "Squeeze" in name
    assert layer.channel_dim(layer(x)) == (1 if channels_first else 2)


def test_conv1d_saves_the_work_of_frozen_columns():
    layer = neq.convert(filled(Conv1D(5, 6)))
    assert isinstance(layer, TransposedLinear)
    assert layer.neuron_parameters() == [
        (layer.weight, NeuronLayout(axis=1)),
        (layer.bias, NeuronLayout()),
    ]
    for active, wgrad in (([1, 3], 2 * 5 * 6 * 2), ([], 0)):
        layer.channels.set(active)
        count = neq.flops.count(layer, torch.randn(ROWS, requires_grad=True))
        assert count.wgrad == wgrad


def config(kind, **more):
    return kind(hidden_size=6, num_attention_heads=2, num_key_value_heads=2, **more)


EXPERTS = {
    "Mixtral": (
        lambda: MixtralExperts(config(MixtralConfig, intermediate_size=4, num_local_experts=3)),
        {"gate_up_proj": (24, 1), "down_proj": (18, 1)},
    ),
    "GptOss": (
        lambda: GptOssExperts(config(GptOssConfig, intermediate_size=4, num_local_experts=3)),
        {
            "gate_up_proj": (24, 2),
            "gate_up_proj_bias": (24, 1),
            "down_proj": (18, 2),
            "down_proj_bias": (18, 1),
        },
    ),
    "NemotronH": (
        lambda: NemotronHExperts(
            config(NemotronHConfig, moe_intermediate_size=4, n_routed_experts=3)
        ),
        {"up_proj": (12, 1), "down_proj": (18, 1)},
    ),
}


def routed(experts):
    index = torch.tensor([[0, 2], [1, 2], [2, 0], [1, 0]])
    return lambda x: experts(x, index, torch.full((4, 2), 0.5, dtype=x.dtype))


class Routed(nn.Module):
    """Experts with a fixed routing, which reaches every one of them."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        index = torch.tensor([[0, 2], [1, 2], [2, 0], [1, 0]])
        return self.experts(x, index, torch.full((4, 2), 0.5, dtype=x.dtype))


def assert_experts(plain, expected, x):
    """Each parameter's neurons: (expert, output feature) pairs, the last one frozen apart."""
    ours = neq.convert(plain)
    dense = {}
    owners = neuron_owners(ours)
    found = {
        name.rpartition(".")[2]: (len(owners[p][0][0]), owners[p][0][1].axis)
        for name, p in ours.named_parameters()
    }
    assert found == expected
    out = ours(x)
    out.square().sum().backward()
    dense = {name: p.grad.clone() for name, p in ours.named_parameters()}
    every = {id(channels): channels for ((channels, _),) in owners.values()}.values()
    assert len(every) == 2
    for channels in every:
        channels.set([i for i in range(len(channels)) if i % 3])
    ours.zero_grad()
    again = ours(x)
    assert torch.equal(again, out)
    again.square().sum().backward()
    for name, parameter in ours.named_parameters():
        ((channels, layout),) = owners[parameter]
        layout.fill_(dense[name], channels.frozen, 0)
        assert torch.equal(parameter.grad, dense[name]), name
        assert bool(layout.gather(parameter.grad, channels.active).ne(0).any())
    for channels in every:
        channels.set([])
    assert not ours(x).requires_grad
    neq.revert(ours)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name):
    make, expected = EXPERTS[name]
    plain = make()
    plain.config._experts_implementation = "eager"
    assert_experts(Routed(filled(plain.double())), expected, torch.randn(4, 6).double())


def test_experts_of_llama4():
    plain = Llama4TextExperts(
        Llama4TextConfig(hidden_size=6, intermediate_size=4, num_local_experts=3)
    )
    expected = {"gate_up_proj": (24, 2), "down_proj": (18, 2)}
    assert_experts(filled(plain.double()), expected, torch.randn(12, 6).double())


def test_parallel_experts_and_routers():
    experts = neq.convert(filled(JetMoeParallelExperts(3, 6, 4).double()))
    x = torch.randn(6, 6).double()
    experts.channels.set([0, 5])  # (expert, feature): (0, 0), (1, 1)
    experts(x, [2, 2, 2]).square().sum().backward()
    assert experts.weight.grad.ne(0).any(2).nonzero().tolist() == [[0, 0], [1, 1]]
    settings = Llama4TextConfig(hidden_size=6, num_local_experts=3)
    for router in (
        Llama4Router(settings),
        GptOssTopKRouter(config(GptOssConfig, num_local_experts=3, num_experts_per_tok=2)),
    ):
        neq.convert(filled(router))
        router.channels.set([2])
        out = router(torch.randn(4, 6))
        sum(t.square().sum() for t in out if t.requires_grad).backward()
        assert router.weight.grad.ne(0).any(1).tolist() == [False, False, True]


def test_experts_that_are_stored_another_way_round_are_left_alone():
    experts = MixtralExperts(config(MixtralConfig, intermediate_size=4, num_local_experts=3))
    experts.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))
    model = neq.convert(nn.Sequential(experts, nn.Linear(2, 2)))
    assert entries(model)["0"].reason == ("its experts are stored otherwise: (3, 6, 8), (3, 6, 4)")


def test_xlnets_attention_has_a_neuron_for_each_head():
    config = XLNetConfig(d_model=6, n_head=3, n_layer=1, d_inner=4, vocab_size=5)
    model = XLNetModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = neq.convert(copy.deepcopy(model))
    attention = ours.layer[0].rel_attn
    assert (len(attention.channels), len(attention.o_neurons.channels)) == (3, 6)
    attention.channels.set([2])
    attention.o_neurons.channels.set([0, 4])
    tokens = torch.tensor([[1, 3, 2, 4]])
    for net in (model, ours):
        net(tokens).last_hidden_state.square().sum().backward()
    dense = dict(model.layer[0].rel_attn.named_parameters())
    for name, parameter in attention.named_parameters():
        if name.startswith("layer_norm") or parameter.grad is None:
            continue
        dim, active = (0, [0, 4]) if name == "o" else (int(parameter.dim() == 3), [2])
        frozen = [i for i in range(parameter.shape[dim]) if i not in active]
        expected = dense[name].grad.index_fill(dim, torch.tensor(frozen), 0)
        torch.testing.assert_close(parameter.grad, expected)
        assert parameter.grad.any(), name
    attention.channels.set([])
    attention.o_neurons.channels.set([])
    ours.zero_grad()
    ours(tokens).last_hidden_state.square().sum().backward()
    grads = {n for n, p in attention.named_parameters() if p.grad is not None}
    assert grads == {"layer_norm.weight", "layer_norm.bias"}
    assert type(neq.revert(ours).layer[0].rel_attn) is type(model.layer[0].rel_attn)
