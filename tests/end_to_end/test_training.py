"""Training with masks that change at every step, against dense gradients masked in the optimizer.

The reference runs the plain model, lets autograd compute everything, and applies the update rules,
written out below element by element, to the elements of active neurons only.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq_kernels as neq
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support import oracle

STEPS = 6


class Net(nn.Module):
    """Groups, dilation, depthwise, transposed, strides, norms of three kinds, a tied weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.group_norm = nn.GroupNorm(3, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=2)
        self.mix = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.mix.weight
        self.layer_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.silu(self.norm(self.stem(x)))
        x = F.silu(self.group_norm(self.depthwise(self.grouped(x))))
        x = self.up(x).mean((2, 3))
        x = self.layer_norm(self.again(F.silu(self.mix(x))))
        return self.head(x)


def grouped_transposed(name, plain):
    """Keywords for the oracle: how to read neurons off the parameter of this name."""
    return {"transposed": True, "groups": plain.up.groups} if name == "up.weight" else {}


# --- the reference optimizers --------------------------------------------------------------------


class Elementwise:
    """State and step of one optimizer, with a bool per element that says whether it is updated."""

    def __init__(self, parameters, frozen_state):
        self.parameters = list(parameters)
        self.frozen_state = frozen_state
        self.state = [self.fresh(p.detach()) for p in self.parameters]

    def fresh(self, p):
        zeros = {name: torch.zeros_like(p) for name in self.buffers}
        return {"steps": torch.zeros_like(p), **zeros}

    @torch.no_grad()
    def step(self, active):
        for p, state, on in zip(self.parameters, self.state, active, strict=True):
            before = {name: tensor.clone() for name, tensor in state.items()}
            moved = self.updated(p, state)
            p.copy_(moved.where(on, p))
            frozen = self.frozen(before)
            for name, tensor in state.items():
                tensor.copy_(tensor.where(on, frozen[name]))

    def frozen(self, state):
        """The state of a neuron that was not updated."""
        if self.frozen_state == "keep":
            return state
        frozen = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        if self.frozen_state == "reference" and "squares" in state:
            frozen["squares"] = self.beta2 * state["squares"]
            frozen["steps"] = state["steps"] + 1
        return frozen


class ReferenceSGD(Elementwise):
    buffers = ("momentum",)

    def __init__(self, parameters, frozen_state, *, lr, momentum, weight_decay, nesterov=False):
        super().__init__(parameters, frozen_state)
        self.lr, self.mu, self.decay, self.nesterov = lr, momentum, weight_decay, nesterov

    def updated(self, p, state):
        g = p.grad + self.decay * p
        state["momentum"].mul_(self.mu).add_(g)
        direction = g + self.mu * state["momentum"] if self.nesterov else state["momentum"]
        return p - self.lr * direction


class ReferenceAdam(Elementwise):
    buffers = ("mean", "squares")

    def __init__(
        self, parameters, frozen_state, *, lr, weight_decay, decoupled, betas=(0.9, 0.999), eps=1e-8
    ):
        super().__init__(parameters, frozen_state)
        self.lr, self.decay, self.decoupled, self.eps = lr, weight_decay, decoupled, eps
        self.beta1, self.beta2 = betas

    def updated(self, p, state):
        g = p.grad if self.decoupled else p.grad + self.decay * p
        state["steps"] += 1
        state["mean"].mul_(self.beta1).add_(g, alpha=1 - self.beta1)
        state["squares"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        mean = state["mean"] / (1 - self.beta1 ** state["steps"])
        squares = state["squares"] / (1 - self.beta2 ** state["steps"])
        kept = p * (1 - self.lr * self.decay) if self.decoupled else p
        return kept - self.lr * mean / (squares.sqrt() + self.eps)


OPTIMIZERS = {
    "SGD": (
        torch.optim.SGD,
        ReferenceSGD,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-3},
        {},
    ),
    "SGD nesterov": (
        torch.optim.SGD,
        ReferenceSGD,
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 5e-3, "nesterov": True},
        {},
    ),
    "Adam": (
        torch.optim.Adam,
        ReferenceAdam,
        {"lr": 0.01, "weight_decay": 1e-2, "eps": 1e-4},
        {"decoupled": False},
    ),
    "AdamW": (
        torch.optim.AdamW,
        ReferenceAdam,
        {"lr": 0.01, "weight_decay": 1e-1, "eps": 1e-4},
        {"decoupled": True},
    ),
}


# --- two runs, step by step ----------------------------------------------------------------------


def masks_of_step(step, k):
    """A different pattern at every step; sometimes everything, sometimes nothing."""
    generator = torch.Generator().manual_seed(1000 * step + k)
    share = (0.5, 1.0, 0.2, 0.0, 0.7, 0.9)[(step + k) % 6]
    return (torch.rand(k, generator=generator) < share).tolist()


def element_masks(plain, masks):
    """For each parameter a bool tensor: True for the elements of active neurons."""
    active = []
    for name, parameter in plain.named_parameters():
        on = torch.zeros_like(parameter, dtype=torch.bool)
        where = grouped_transposed(name, plain)
        for k, is_active in enumerate(masks[name.rpartition(".")[0]]):
            if is_active:
                oracle.neuron(on, k, **where).fill_(True)
        active.append(on)
    return active


def make_runs(name, dtype, frozen_state, seed, channels_last):
    torch.manual_seed(seed)
    optimizer_class, reference_class, options, more = OPTIMIZERS[name]
    plain = Net().to(dtype)
    if channels_last:
        plain = plain.to(memory_format=torch.channels_last)
    ours = neq.convert(copy.deepcopy(plain))
    optimizer = optimizer_class(ours.parameters(), **options)
    neq.attach(optimizer, ours, frozen_state)
    reference = reference_class(plain.parameters(), frozen_state, **options, **more)
    return plain, reference, ours, optimizer


def images(seed, step, dtype, channels_last):
    generator = torch.Generator().manual_seed(100 * seed + step)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randint(0, 5, (8,), generator=generator)


def set_masks(ours, step):
    masks = {}
    for name, layer in named_neuron_layers(ours):
        masks[name] = masks_of_step(step, len(layer.channels))
        if layer is not ours.again:
            layer.channels.set(masks[name])
        else:
            masks[name] = masks["mix"]
    return masks


def train(runs, *, dtype, seed=0, channels_last=False, check_frozen=True):
    """Six steps of both runs; frozen neurons of ours do not move, bit for bit."""
    plain, reference, ours, optimizer = runs
    for step in range(STEPS):
        masks = set_masks(ours, step)
        x, target = images(seed, step, dtype, channels_last)
        for model in (plain, ours):
            model.zero_grad()
            F.cross_entropy(model(x), target).backward()
        active = element_masks(plain, masks)
        before = [p.detach().clone() for p in ours.parameters()]
        optimizer.step()
        reference.step(active)
        if check_frozen:
            for p, old, on in zip(ours.parameters(), before, active, strict=True):
                assert torch.equal(p.detach()[~on], old[~on]), "a frozen neuron moved"
    return ours, plain


def assert_equal_models(ours, plain):
    """Parameters and running statistics within 1e-10, relative, in the maximum norm."""
    for (key, a), (_, b) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        if a.is_floating_point():
            oracle.assert_close64(a, b, 1e-10)
        else:
            assert torch.equal(a, b), key


FROZEN_STATES = pytest.mark.parametrize("frozen_state", ["reset", "keep", "reference"])
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@FROZEN_STATES
@every_optimizer
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_float64_training_is_the_reference(backend, name, frozen_state, channels_last):
    runs = make_runs(name, torch.float64, frozen_state, 0, channels_last)
    ours, plain = train(runs, dtype=torch.float64, channels_last=channels_last)
    assert_equal_models(ours, plain)


@every_optimizer
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_float32_training_is_within_the_rule(backend, name, channels_last):
    """Against the float64 reference, beside the same reference in float32; three runs, one sample
    per tensor."""
    errors = {"ours": {}, "theirs": {}, "size": {}}
    for seed in range(3):
        options = {"seed": seed, "channels_last": channels_last}
        low = make_runs(name, torch.float32, "reset", seed, channels_last)
        exact = make_runs(name, torch.float64, "reset", seed, channels_last)
        for model, initial in ((exact[0], low[0]), (exact[2], low[2])):
            model.load_state_dict(initial.state_dict())
        ours, theirs = train(low, dtype=torch.float32, **options)
        _, true = train(exact, dtype=torch.float64, **options)
        for key, value in true.named_parameters():
            for who, model in (("ours", ours), ("theirs", theirs)):
                error = oracle.largest(model.get_parameter(key).detach().double() - value)
                errors[who][key] = max(error, errors[who].get(key, 0.0))
            errors["size"][key] = max(oracle.largest(value), errors["size"].get(key, 0.0))
    for key, size in errors["size"].items():
        allowed = 2 * errors["theirs"][key] + torch.finfo(torch.float32).eps / 2 * size
        assert errors["ours"][key] <= allowed, key


def test_a_model_frozen_throughout_stays_bit_equal():
    """No weight decay, no momentum, no drift of Adam; the head alone learns."""
    for name, (optimizer_class, _, options, _) in OPTIMIZERS.items():
        model = neq.convert(Net())
        optimizer = optimizer_class(model.parameters(), **options)
        neq.attach(optimizer, model)
        for step in range(3):  # momentum and moments exist before anything is frozen
            x, target = images(0, step, torch.float32, False)
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        for key, layer in named_neuron_layers(model):
            if key != "head":
                layer.channels.set([])
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        for step in range(10):
            x, target = images(1, step, torch.float32, False)
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
        for key, p in model.named_parameters():
            assert torch.equal(p, before[key]) == (not key.startswith("head")), (name, key)


def test_a_mask_off_by_one_is_caught(monkeypatch):
    """The comparison above can fail."""
    runs = make_runs("SGD", torch.float64, "reset", 0, False)
    original = neq.ActiveChannels.set

    def off_by_one(self, mask):
        original(self, mask[-1:] + mask[:-1] if isinstance(mask, list) else mask)

    monkeypatch.setattr(neq.ActiveChannels, "set", off_by_one)
    with pytest.raises(AssertionError, match="a frozen neuron moved"):
        train(runs, dtype=torch.float64)


def test_weight_decay_on_frozen_neurons_is_caught():
    """A stock optimizer on masked gradients moves them; the comparison sees it."""
    plain, reference, ours, _ = make_runs("AdamW", torch.float64, "reset", 0, False)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.1)
    with pytest.raises(AssertionError, match="a frozen neuron moved"):
        train((plain, reference, ours, optimizer), dtype=torch.float64)


def test_state_that_is_kept_instead_of_reset_is_caught():
    """Momentum, moments and per-neuron step counts matter at the tolerance of the comparison."""
    for name in OPTIMIZERS:
        runs = make_runs(name, torch.float64, "reset", 0, False)
        runs[1].frozen_state = "keep"
        ours, plain = train(runs, dtype=torch.float64)
        with pytest.raises(AssertionError, match="relative error"):
            assert_equal_models(ours, plain)


@every_optimizer
def test_the_reference_with_everything_active_is_torchs_optimizer(name):
    optimizer_class, reference_class, options, more = OPTIMIZERS[name]
    model = Net().double()
    twin = copy.deepcopy(model)
    optimizer = optimizer_class(model.parameters(), **options)
    reference = reference_class(twin.parameters(), "reset", **options, **more)
    for step in range(STEPS):
        x, target = images(0, step, torch.float64, False)
        for each in (model, twin):
            each.zero_grad()
            F.cross_entropy(each(x), target).backward()
        optimizer.step()
        reference.step([torch.ones_like(p, dtype=torch.bool) for p in twin.parameters()])
    assert_equal_models(model, twin)
