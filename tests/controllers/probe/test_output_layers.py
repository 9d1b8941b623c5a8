"""The output layers: the last converted layer on each path to an output."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import neq_kernels as neq
from neq_kernels.controllers import NEqController, StochasticController
from tests.support.nets import Block, conv_net, images, masks, picture, tokens, wiggle


class Graph(nn.Module):
    """Four linear layers and a function that wires them."""

    def __init__(self, wiring):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))
        self.wiring = wiring
        neq.convert(self)

    def forward(self, x):
        return self.wiring(self, x)


@dataclass
class Answer:
    logits: torch.Tensor
    extra: object = None


def second_head_without_gradient(m, x):
    with torch.no_grad():
        hidden = m.a(x)
    return m.b(hidden)


def in_place_after_the_head(m, x):
    return m.b(m.a(x).relu_()).mul_(2).relu_()


def stream(m, x):
    for layer in (m.a, m.b, m.c):
        x = x + layer(torch.tanh(x))
    return x


WIRINGS = {
    "chain": (lambda m, x: m.d(m.c(m.b(m.a(x)))), "d"),
    "not the last in order": (lambda m, x: m.a(m.d(m.c(m.b(x)))), "a"),
    "two heads": (lambda m, x: (m.b(m.a(x)), m.c(m.a(x))), "bc"),
    "auxiliary head inside": (lambda m, x: {"out": m.c(m.b(m.a(x))), "aux": [m.d(m.a(x))]}, "cd"),
    "residual": (lambda m, x: m.a(x) + m.c(m.b(m.a(x))), "ac"),
    "residual stream": (lambda m, x: stream(m, m.d(x)), "c"),
    "reused in a residual stream": (lambda m, x: stream(m, stream(m, x)), "c"),
    "a branch of the last layer": (lambda m, x: (m.c(y := m.b(m.a(x))), y), "c"),
    "residual around the head": (lambda m, x: m.b(m.a(x)) + x, "b"),
    "reused": (lambda m, x: m.a(m.b(m.a(x))), "a"),
    "dataclass": (lambda m, x: Answer(m.b(m.a(x)), "text"), "b"),
    "loss": (lambda m, x: m.b(m.a(x)).square().mean(), "b"),
    "in place": (in_place_after_the_head, "b"),
    "split and joined": (lambda m, x: torch.cat(m.b(m.a(x)).chunk(3, -1)[::-1], -1), "b"),
    "no gradient below": (second_head_without_gradient, "b"),
    "an output that has none": (lambda m, x: (m.b(m.a(x)), m.c(x).argmax(-1)), "b"),
    "checkpointed": (
        lambda m, x: m.b(checkpoint(lambda y: m.a(y).relu_(), x, use_reentrant=False)),
        "b",
    ),
    "checkpointed head": (lambda m, x: checkpoint(m.b, m.a(x), use_reentrant=False), "b"),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_wirings(name):
    wiring, expected = WIRINGS[name]
    model = Graph(wiring)
    model.b.requires_grad_(False)
    probe = [torch.randn(2, 5, 3)]
    with torch.no_grad():
        with_frozen = StochasticController(model, 0.5, probe=probe)
    assert with_frozen.outputs == list(expected)
    assert all(p.grad is None for p in model.parameters())


def test_networks():
    assert StochasticController(conv_net(), 0.5, probe=images()).outputs == ["9"]
    assert StochasticController(neq.convert(Block()), 0.5, probe=tokens()).outputs == ["head"]


def test_torchvision():
    from torchvision import models

    x = torch.randn(1, 3, 64, 64)
    resnet = neq.convert(models.resnet18(num_classes=4))
    assert StochasticController(resnet, 0.5, probe=[x]).outputs == ["fc"]
    segmenter = models.segmentation.fcn_resnet50(
        num_classes=3, aux_loss=True, weights_backbone=None
    )
    found = StochasticController(neq.convert(segmenter), 0.5, probe=[x]).outputs
    assert found == ["classifier.4", "aux_classifier.4"]


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)
        self.stem, self.out = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.out(torch.cat([self.up(self.down(x).relu()), x], 1))


def test_a_skip_connection():
    found = StochasticController(neq.convert(UNet()), 0.5, probe=[torch.randn(1, 3, 8, 8)])
    assert found.outputs == ["out"]


def language_model(name):
    """What comes after the last block was not converted: a tied head, or norms too."""
    import transformers as hf

    size = {"vocab_size": 20, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    both = ids | {"decoder_input_ids": ids["input_ids"]}
    model, batch, last = {
        "gpt2": lambda: (hf.GPT2LMHeadModel(hf.GPT2Config(**size)), ids, "transformer.ln_f"),
        "llama": lambda: (
            hf.LlamaForCausalLM(hf.LlamaConfig(**size, intermediate_size=12)),
            ids,
            "model.layers.1.mlp.down_proj",
        ),
        "t5": lambda: (
            hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
            ),
            both,
            "decoder.block.1.layer.2.DenseReluDense.wo",
        ),
    }[name]()
    tied = ("lm_head", "embed_tokens", "shared", "wte")
    neq.convert(model, norms=name == "gpt2", filter=lambda name, _: not name.endswith(tied))
    return model, batch, last


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_residual_stream_into_a_head_without_neurons(name):
    model, batch, last = language_model(name)
    assert StochasticController(model, 0.5, probe=[batch]).outputs == [last]


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.a(x).detach(),
        lambda m, x: m.a(x).argmax(-1),
        lambda m, x: [m.a(x).tolist()],
        lambda m, x: x,
    ],
)
def test_no_path_to_an_output(wiring):
    model = Graph(wiring)
    with pytest.raises(ValueError, match=r"outputs=\[...\] or give include_output=True"):
        StochasticController(model, 0.5, probe=[torch.ones(2, 3)])
    assert (
        StochasticController(model, 0.5, probe=[torch.ones(2, 3)], include_output=True).outputs
        == []
    )


def test_a_forward_that_returns_nothing():
    def forward(model, batch):
        model(batch)

    with pytest.raises(ValueError, match="has to return the model's output"):
        NEqController(conv_net(), images(), forward=forward)


def test_without_a_probe_the_last_conv_or_linear_layer():
    assert StochasticController(conv_net(), 0.5).outputs == ["9"]
    model = neq.convert(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    assert StochasticController(model, 0.5).outputs == ["0"]
    assert StochasticController(model, 0.5, probe=[torch.ones(2, 3)]).outputs == ["1"]
    only_norms = neq.convert(nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3)))
    assert StochasticController(only_norms, 0.5).outputs == ["1"]


def test_named_outputs():
    controller = NEqController(conv_net(), images(), outputs=["0", "4"], eps=10)
    controller.step()
    active = {name: any(mask) for name, mask in masks(controller._model).items()}
    assert active == {"0": True, "1": False, "3": False, "4": True, "9": False}
    assert controller.outputs == ["0", "4"]


@pytest.mark.parametrize("make", [NEqController, StochasticController])
def test_wrong_names(make):
    model = conv_net()
    second = images() if make is NEqController else 0.5
    before = picture(model)
    with pytest.raises(ValueError, match=r"outputs: expected names among .*got \['fc', 'head'\]"):
        make(model, second, outputs=["9", "head", "fc"])
    with pytest.raises(TypeError, match="outputs: expected a list of layer names"):
        make(model, second, outputs="9")
    with pytest.raises(ValueError, match="include_output=True"):
        make(model, second, outputs=["9"], include_output=True)
    assert picture(model) == before


def test_include_output_keeps_the_fastest_neuron():
    model = conv_net()
    controller = NEqController(model, images(), eps=10, include_output=True)
    wiggle(model)
    controller.step()
    velocity = controller.response.velocity
    layer = max(velocity, key=lambda name: velocity[name].abs().max())
    neuron = int(velocity[layer].abs().argmax())
    assert {
        (name, k) for name, mask in masks(model).items() for k, on in enumerate(mask) if on
    } == {(layer, neuron)}


def test_output_layers_stay_active():
    model = conv_net()
    controller = NEqController(model, images(), eps=10)
    wiggle(model)
    controller.step()
    assert {name: any(mask) for name, mask in masks(model).items()} == {
        "0": False,
        "1": False,
        "3": False,
        "4": False,
        "9": True,
    }
    assert all(masks(model)["9"])
