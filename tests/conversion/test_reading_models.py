"""Public models whose modules read their layers' weights without calling the layers."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video.swin_transformer import SwinTransformer3d

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners
from tests.support import oracle
from tests.support.models import (
    converted,
    output_of,
    set_ragged,
    tiny_swin,
    tiny_vit,
)

IMAGE = torch.randn(2, 3, 32, 32)
TOKENS = torch.arange(16).view(2, 8)
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
MAMBA = TEXT | {"state_size": 4}
HEADS = {"num_attention_heads": 2, "intermediate_size": 32}


def tiny_swin_v2():
    return tiny_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def tiny_swin_3d():
    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [4, 4, 4], num_classes=5)


def timm_model(name, **options):
    return lambda: timm.create_model(
        name, img_size=32, num_classes=5, **{"depth": 2, "num_heads": 2, "embed_dim": 16} | options
    )


# Model, input, and the layers whose weights are read, of each reader.
MODELS = {
    "swin": (tiny_swin, IMAGE, {"qkv", "proj"}),
    "swin v2": (tiny_swin_v2, IMAGE, {"qkv", "proj"}),
    "swin 3d": (tiny_swin_3d, torch.randn(1, 3, 4, 32, 32), {"qkv", "proj"}),
    "timm beit": (timm_model("beit_base_patch16_224"), IMAGE, {"qkv"}),
    "timm eva": (
        timm_model("eva02_tiny_patch14_224", qkv_fused=True, patch_size=8), IMAGE, {"qkv"},
    ),
    "timm swin v2": (
        timm_model(
            "swinv2_tiny_window8_256", depth=None, depths=(2, 2), num_heads=(2, 4), window_size=4
        ),
        IMAGE,
        {"qkv"},
    ),
    "wavlm": (
        lambda: transformers.WavLMModel(transformers.WavLMConfig(**SPEECH)),
        torch.randn(2, 800),
        {"q_proj", "k_proj", "v_proj", "out_proj"},
    ),
    "mamba": (
        lambda: transformers.MambaModel(transformers.MambaConfig(**MAMBA)),
        TOKENS,
        {"conv1d", "x_proj", "dt_proj", "out_proj"},
    ),
    "falcon mamba": (
        lambda: transformers.FalconMambaModel(transformers.FalconMambaConfig(**MAMBA)),
        TOKENS,
        {"conv1d", "x_proj", "dt_proj", "out_proj"},
    ),
    "jamba": (
        lambda: transformers.JambaModel(
            transformers.JambaConfig(
                **TEXT | HEADS, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
                num_experts=1, mamba_d_state=4, use_mamba_kernels=False,
            )
        ),
        TOKENS,
        {"conv1d", "dt_proj"},
    ),
    "deberta": (
        lambda: transformers.DebertaModel(
            transformers.DebertaConfig(
                **TEXT | HEADS, relative_attention=True, pos_att_type=["c2p", "p2c"]
            )
        ),
        TOKENS,
        {"in_proj", "rel_embeddings"},
    ),
    "bloom": (
        lambda: transformers.BloomModel(
            transformers.BloomConfig(
                vocab_size=50, hidden_size=16, n_layer=2, n_head=2, pretraining_tp=2,
                slow_but_exact=True,
            )
        ),
        TOKENS,
        {"dense", "dense_4h_to_h"},
    ),
    "tdnn": (
        lambda: transformers.Wav2Vec2ForXVector(
            transformers.Wav2Vec2Config(
                **SPEECH, tdnn_dim=(8, 8), tdnn_kernel=(5, 3), tdnn_dilation=(1, 1),
                xvector_output_dim=8,
            )
        ),
        torch.randn(2, 1600),
        {"kernel"},
    ),
}  # fmt: skip


def run(model, x, seed=0):
    torch.manual_seed(seed)
    if x.dtype != torch.int64:
        x = x.to(next(model.parameters()).dtype)
    out = model(x)
    if not isinstance(out, torch.Tensor):
        out = out[0]
    return out


def assert_gradients(ours, plain):
    """Some, of shifts before a softmax or a norm, are nothing but rounding."""
    owners = neuron_owners(ours)
    pairs = [*zip(ours.named_parameters(), plain.parameters(), strict=True)]
    rounding = 1e-12 * max(oracle.largest(p.grad) for _, p in pairs if p.grad is not None)
    for (name, parameter), dense in pairs:
        assert (parameter.grad is None) == (dense.grad is None), name
        if dense.grad is None:
            continue
        expected = dense.grad.clone()
        for channels, layout in owners.get(parameter, ()):
            layout.fill_(expected, channels.frozen, 0)
            assert not layout.gather(parameter.grad, channels.frozen).any(), name
        error = oracle.largest(parameter.grad - expected)
        assert error <= 1e-9 * oracle.largest(expected) + rounding, name


@pytest.mark.parametrize("name", MODELS)
def test_public_models_have_gradients_of_active_rows(name):
    make, x, read = MODELS[name]
    torch.manual_seed(0)
    plain = make().double()
    ours = neq.convert(copy.deepcopy(plain))
    readers = [m for m in ours.modules() if "neq_weight_reads" in vars(m)]
    found = {layer.rpartition(".")[2] for m in readers for layer, _ in m.neq_weight_reads._layers}
    assert {name for name in found if not name.endswith("norm")} == read
    for training in (True, False):
        plain.train(training)
        ours.train(training)
        for set_masks in (lambda _: None, set_ragged):
            set_masks(ours)
            assert torch.equal(run(ours, x), run(plain, x))
        with torch.no_grad():
            assert torch.equal(run(ours, x), run(plain, x))
    for model in (plain, ours):
        run(model, x).square().sum().backward()
    assert_gradients(ours, plain)
    others = {entry.name for entry in neq.conversion_report(ours).others}
    assert set(neq.verify(ours.float(), x)) <= others
    neq.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("make", [tiny_vit, tiny_swin, tiny_swin_v2, tiny_swin_3d])
def test_torchvisions_transformers_are_converted_whole(make):
    model = neq.convert(make())
    left = {e.name for e in neq.conversion_report(model).modules if not e.converted}
    assert all("attn" in name or name in ("", "encoder") for name in left)  # their tables
    assert not any(name.endswith(("qkv", "proj")) for name in left)


def test_controllers_see_the_layers_that_are_read():
    model = neq.convert(tiny_swin_v2())
    controller = neq.NEqController(model, [IMAGE])
    layer = model.features[1][1].attn.qkv
    with torch.no_grad():
        layer.weight[5] *= -1
    controller.step()
    assert layer.channels.active.tolist() == [5]
    below = [n for n in converted(model) if n.startswith(("features.0", "features.1.0"))]
    assert not any(model.get_submodule(name).channels.n_active for name in below)
    row = {row.name: row for row in neq.flops.count(model, IMAGE).layers}["features.1.1.attn.qkv"]
    assert (row.neurons, row.active) == (48, 1)


@pytest.mark.parametrize("size", [16, 20, 24, 36])
@pytest.mark.parametrize("training", [True, False])
def test_swin_is_torchvisions_bit_for_bit(size, training):
    """Windows as large as the image, images that need padding, shifted windows, dropout."""
    plain = tiny_swin(attention_dropout=0.1).train(training)
    ours = neq.convert(copy.deepcopy(plain))
    for _, layer in named_neuron_layers(ours):
        layer.channels.set([0])
    x = torch.randn(2, 3, size, size + 4)
    assert torch.equal(output_of(ours, x), output_of(plain, x))


def test_torchvisions_feature_extractor_keeps_the_neurons():
    plain = tiny_swin().double().eval()
    ours = neq.convert(copy.deepcopy(plain))
    extractors = [create_feature_extractor(m, ["features.3"]) for m in (plain, ours)]
    set_ragged(ours)
    for extractor in extractors:
        extractor(IMAGE.double())["features.3"].square().sum().backward()
    assert_gradients(ours, plain)
