"""Parameters that follow the layers of their block (others="follow")."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._C import _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint

import neq_kernels as neq
from neq_kernels.layers.following import followers
from neq_kernels.layers.traversal import named_neuron_layers, neuron_owners
from tests.support import oracle
from tests.support.models import (
    Scaled,
    converted,
    freeze,
    output_of,
    set_ragged,
    tiny_convnext,
    tiny_swin,
    tiny_vit,
)


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
        (tiny_convnext, 32, "classifier.2", "classifier.2"),
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
    assert [f.parameter for f in followers(twin)] == [twin[0].scale]
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


def test_a_mode_without_gradients_reads_the_parameter():
    seen = []

    class Spy(Scaled):
        def forward(self, x):
            seen.append(self.scale)
            return super().forward(x)

    model = neq.convert(nn.Sequential(Spy(), nn.Linear(4, 2)), others="follow")
    freeze(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        model(x)
    model(x)
    scale = model[0].scale
    assert [s is scale for s in seen] == [True, True, False]
    assert not seen[-1].requires_grad
    assert seen[-1].data_ptr() == scale.data_ptr()


def test_outside_a_forward_the_parameter_is_itself():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    scale = dict(model.named_parameters())["0.scale"]
    freeze(model, but=["1"])
    for _ in range(2):
        assert model[0].scale is scale
        assert [p for p in model.parameters() if p is scale]
        model(torch.randn(3, 4)).sum().backward()
    assert scale.grad is None


def test_the_class_is_named_like_the_one_it_was():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    assert isinstance(model[0], Scaled)
    assert type(model[0]).__name__ == "Scaled"
    assert type(model[0]) is type(
        neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")[0]
    )
    assert repr(model) == repr(neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2))))
    neq.revert(model)
    assert type(model[0]) is Scaled


class Around(nn.Module):
    """A block without a forward of its own: what is in it is called one by one."""

    def __init__(self):
        super().__init__()
        self.scale, self.layers = nn.Parameter(torch.ones(4)), nn.ModuleList()
        self.layers.append(nn.Linear(4, 4))


class Iterated(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Around(), Around()])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(4))})
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = x + self.named["shift"]
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = block.scale * block.layers[0](x) * scale
        return self.head(x)


def test_blocks_that_are_iterated_and_never_called():
    torch.manual_seed(0)
    model = neq.convert(Iterated(), others="follow")
    x = torch.randn(3, 4)
    assert learned(model, x) == {name for name, _ in model.named_parameters()}
    model.blocks[0].layers[0].channels.set([])
    assert "blocks.0.scale" not in learned(model, x)  # its block
    assert "named.shift" not in learned(model, x)  # below all layers
    assert "scales.0" in learned(model, x)  # feeds the next block
    freeze(model, but=["head"])
    # The last scales feed the head, which learns; the block of one of them has stopped.
    assert learned(model, x) == {"head.weight", "head.bias", "scales.1"}


def learned(model, x):
    """The parameters that get a gradient."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


class Inside(nn.Module):
    """A block that runs its own body under a checkpoint, as those of transformers do."""

    def __init__(self, reentrant):
        super().__init__()
        self.scale, self.linear, self.reentrant = (
            nn.Parameter(torch.ones(4)),
            nn.Linear(4, 4),
            reentrant,
        )

    def body(self, x):
        return torch.tanh(self.linear(x * self.scale))

    def forward(self, x):
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_the_forward_of_the_block(reentrant):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), Inside(None), Inside(None), nn.Linear(4, 2)).double()
    ours = copy.deepcopy(plain)
    for block in ours[1:3]:
        block.reentrant = reentrant
    neq.convert(ours, others="follow")
    x = torch.randn(3, 4, dtype=torch.float64)
    everything = learned(ours, x)
    assert everything == learned(plain, x)
    ours[1].linear.channels.set([])
    assert learned(ours, x) == everything - {"1.scale", "1.linear.weight", "1.linear.bias"}
    learned(plain, x)
    for expected, parameter in zip(plain.parameters(), ours.parameters(), strict=True):
        if parameter.grad is not None:
            oracle.assert_close64(parameter.grad, expected.grad, 1e-12)
    ours[1].linear.channels.reset()
    assert learned(ours, x) == everything


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.recurrent = kind(4, 4)

    def forward(self, x):
        out = self.recurrent(self.stem(x))
        return self.head(torch.tanh(self.middle(out[0] if isinstance(out, tuple) else out)))


def two_layers(kind):
    return lambda *sizes: kind(*sizes, num_layers=2, bidirectional=False)


@pytest.mark.parametrize(
    "kind",
    [two_layers(nn.LSTM), two_layers(nn.GRU), two_layers(nn.RNN), nn.LSTMCell, nn.GRUCell],
    ids=["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell"],
)
def test_recurrent_layers_stop_too(kind):
    torch.manual_seed(0)
    plain = Recurrent(kind).double()
    made = copy.deepcopy(plain)
    neq.convert(made, others="follow")
    x = torch.randn(5, 4, dtype=torch.float64)
    everything = learned(made, x)
    for ours in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(ours(x), plain(x))
        freeze(ours, but=["middle", "head"])
        assert any(name.startswith("recurrent") for name in learned(ours, x))  # feeds the middle
        freeze(ours, but=["head"])
        assert learned(ours, x) == {"head.weight", "head.bias"}
        ours.stem.channels.reset()
        assert learned(ours, x) == everything - {"middle.weight", "middle.bias"}
        ours.middle.channels.reset()
        assert learned(ours, x) == everything
        learned(plain, x)
        for expected, parameter in zip(plain.parameters(), ours.parameters(), strict=True):
            oracle.assert_close64(parameter.grad, expected.grad, 1e-12)
    neq.revert(made)
    assert type(made.recurrent) is type(plain.recurrent)
    assert torch.equal(made(x), plain(x))


def test_what_a_forward_shows_reaches_the_optimizer():
    """The masks do not change, but who has stopped does: momentum and decay must not move it."""
    model = neq.convert(Iterated(), others="follow")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    neq.attach(optimizer, model)
    model.blocks[0].layers[0].channels.set([])
    shift = model.named["shift"]
    x = torch.randn(3, 4)
    moved = []
    for _ in range(3):
        before = shift.detach().clone()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        moved.append(not torch.equal(before, shift))
    assert moved == [False, False, False]


def test_an_interrupted_forward_leaves_nothing_behind():
    class Interrupted(Scaled):
        interrupt = True

        def forward(self, x):
            if self.interrupt:
                raise KeyboardInterrupt
            return super().forward(x)

    model = neq.convert(
        nn.Sequential(nn.Linear(4, 4), Interrupted(), nn.Linear(4, 2)), others="follow"
    )
    x = torch.randn(3, 4)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    Interrupted.interrupt = False
    freeze(model, but=["2"])
    for _ in range(2):
        model(x)
        assert _len_torch_dispatch_stack() == 0
    assert learned(model, x) == {"2.weight", "2.bias"}


def test_submodules_called_on_their_own():
    """No forward runs all layers, so blocks decide for themselves."""
    model = neq.convert(nn.ModuleDict({"a": Scaled(), "b": Scaled()}), others="follow")
    x = torch.randn(3, 4)
    model["a"].linear.channels.set([])
    for _ in range(2):
        model.zero_grad()
        model["b"](model["a"](x)).sum().backward()
        grads = {name for name, p in model.named_parameters() if p.grad is not None}
        assert grads == {"b.linear.weight", "b.linear.bias", "b.scale"}


def test_a_copied_block_takes_no_other_layer_along():
    model = neq.convert(nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 2)), others="follow")
    memo = {}
    twin = copy.deepcopy(model[1], memo)
    assert not {id(model[0]), id(model[2])} & memo.keys()
    twin.linear.channels.set([])
    twin(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert twin.scale.grad is None


def test_a_parametrization_on_top():
    model = neq.convert(nn.Sequential(Scaled(), nn.Linear(4, 2)), others="follow")
    torch.nn.utils.parametrize.register_parametrization(model[0], "scale", nn.Identity())
    freeze(model, but=["1"])
    assert "0.parametrizations.scale.original" in learned(model, torch.randn(3, 4))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "efficientnet_b0"])
def test_timm_stops_at_a_frozen_lower_half(name):
    import timm

    size = {"img_size": 32} if name.startswith("vit") else {}
    model = neq.convert(timm.create_model(name, **size), others="follow")
    assert_the_lower_half_stops(model, torch.randn(2, 3, 32, 32))


def assert_the_lower_half_stops(model, x):
    run = (lambda: model(**x)) if isinstance(x, dict) else (lambda: model(x))
    called, asks = [], []
    layers = [layer for _, layer in named_neuron_layers(model)]
    hooks = [layer.register_forward_hook(lambda m, *_: called.append(m)) for layer in layers]
    run()
    order = list(dict.fromkeys(called))
    lower = order[: len(order) // 2]
    for hook in hooks:
        hook.remove()
    for layer in lower:
        layer.channels.set([])
        layer.register_forward_hook(lambda m, args, out: asks.append(out.requires_grad))
    run()
    assert len(asks) >= len(lower)
    assert not any(asks)


def tiny_transformers():
    import transformers as hf

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 30, "intermediate_size": 20}
    ids = torch.randint(0, 30, (2, 5))
    image = torch.randn(2, 3, 32, 32)
    conv = {"hidden_sizes": [4, 8], "depths": [1, 2], "num_stages": 2}
    return {
        "vit": (
            hf.ViTForImageClassification(
                hf.ViTConfig(**size, intermediate_size=20, image_size=32, patch_size=8)
            ),
            {"pixel_values": image},
        ),
        "llama": (hf.LlamaForCausalLM(hf.LlamaConfig(**text)), {"input_ids": ids}),
        "bert": (hf.BertForSequenceClassification(hf.BertConfig(**text)), {"input_ids": ids}),
        "convnext": (
            hf.ConvNextForImageClassification(hf.ConvNextConfig(**conv)),
            {"pixel_values": image},
        ),
    }


@pytest.mark.parametrize("name", ["vit", "llama", "bert", "convnext"])
def test_transformers_stop_at_a_frozen_lower_half(name):
    model, batch = tiny_transformers()[name]
    assert_the_lower_half_stops(neq.convert(model, others="follow"), batch)
