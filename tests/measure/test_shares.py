"""Shares of the dense step and the bound. Time is replaced by FLOPs, so shares are exact."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import neq_kernels as neq
from benchmarks.common.models import CifarResNet
from neq_kernels.layers.traversal import named_neuron_layers
from neq_kernels.measure import flops
from neq_kernels.measure.cache_lines import ChannelLines
from neq_kernels.measure.flops import FlopCount, LayerFlops
from neq_kernels.measure.shares import (
    LayerShare,
    StepShares,
    backward_shares,
    bound,
    frozen_parameter_fraction,
)
from neq_kernels.measure.timing import PhaseClock, Quantiles

BATCHES = [(torch.randn(2, 3, 8, 8), torch.tensor([1, 2])) for _ in range(2)]


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def flops_as_seconds(monkeypatch):
    """Every operation takes as long as it has FLOPs."""
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(PhaseClock, "now", lambda self: float(counter.get_total_flops()))
        yield


def freeze_all_but_head(model: nn.Module, share: float) -> None:
    for name, layer in named_neuron_layers(model):
        if name != "linear":
            layer.channels.set(range(round(share * len(layer.channels))))


@pytest.mark.parametrize("converted", [False, True])
def test_shares_are_those_of_the_flops(flops_as_seconds, converted):
    model = CifarResNet(8)
    if converted:
        neq.convert(model)
        freeze_all_but_head(model, 0.25)
    dense = flops.count(CifarResNet(8), BATCHES[0])
    shares = backward_shares(model, BATCHES, cross_entropy, warmup=1, repeats=1)
    products = [row for row in dense.layers if row.kind != "norm"]
    step = sum(row.macs + row.dgrad_macs + row.wgrad_macs for row in products)
    by_name = {layer.name: layer for layer in shares.layers}
    for row in products:
        assert by_name[row.name].wgrad == pytest.approx(row.wgrad_macs / step)
        assert by_name[row.name].dgrad == pytest.approx(row.dgrad_macs / step)
    assert shares.forward == pytest.approx(sum(row.macs for row in products) / step)
    assert shares.forward + shares.backward + shares.optimizer == pytest.approx(1)


def test_the_bound_is_that_of_the_flops(flops_as_seconds):
    shares = backward_shares(CifarResNet(8), BATCHES, cross_entropy, warmup=0, repeats=1)
    model = neq.convert(CifarResNet(8))

    def executed(count):
        rows = [row for row in count.layers if row.kind != "norm"]
        return sum(row.macs + row.dgrad_macs + row.wgrad_macs for row in rows)

    dense = flops.count(model, BATCHES[0])
    assert bound(shares, dense) == pytest.approx(1)
    for share in (0.5, 0.0):  # 0: backprop stops at the head
        freeze_all_but_head(model, share)
        now = flops.count(model, BATCHES[0])
        assert bound(shares, now) == pytest.approx(executed(dense) / executed(now))


def test_the_model_and_its_masks_are_left_alone():
    model = neq.convert(CifarResNet(8))
    freeze_all_but_head(model, 0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    make = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    shares = backward_shares(model, BATCHES, cross_entropy, make, warmup=0, repeats=1)
    assert shares.optimizer > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.conv1.channels.n_active == 8
    assert torch.equal(torch.get_rng_state(), random)


def test_autocast_steps_are_replayed_in_their_own_dtype(monkeypatch):
    seen = []
    real = torch.autograd.grad

    def spy(outputs, inputs, grad_outputs):
        seen.append(outputs.dtype)
        return real(outputs, inputs, grad_outputs)

    monkeypatch.setattr("torch.autograd.grad", spy)

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch)

    backward_shares(CifarResNet(8), BATCHES, loss, warmup=0, repeats=1)
    assert set(seen) == {torch.bfloat16}
    # With and without weight gradients; the first of the 8 layers has no input gradient.
    assert len(seen) == 2 * 8 - 1


SHARES = StepShares(
    seconds=Quantiles(0.9, 1.0, 1.1),
    forward=0.3,
    backward=0.6,
    optimizer=0.1,
    layers=(LayerShare("a", 0.1, 0.0), LayerShare("b", 0.2, 0.1), LayerShare("c", 0.1, 0.1)),
)


def counted(active: dict[str, int], stopped: str = "a") -> FlopCount:
    return FlopCount(
        tuple(
            LayerFlops(name, "linear", 1, 10, n, 100, 0 if name in stopped else 100, 10 * n)
            for name, n in active.items()
        )
    )


@pytest.mark.parametrize(
    ("active", "stopped", "frozen_parameters", "expected"),
    [
        ({"a": 10, "b": 10, "c": 10}, "a", 0.0, 1.0),
        ({"a": 10, "b": 5, "c": 10}, "a", 0.0, 1 / (1 - 0.1)),
        ({"a": 0, "b": 5, "c": 10}, "ab", 0.0, 1 / (1 - 0.1 - 0.1 - 0.1)),
        ({"a": 0, "b": 0, "c": 10}, "abc", 0.5, 1 / (1 - 0.1 - 0.2 - 0.1 - 0.1 - 0.05)),
    ],
)
def test_hand_worked_bounds(active, stopped, frozen_parameters, expected):
    assert bound(SHARES, counted(active, stopped), frozen_parameters) == pytest.approx(expected)


# The step takes 1 s, memory yields 1000 bytes/s and takes 500: a byte read is a thousandth of the
# step, a byte written two.
READ = StepShares(
    seconds=Quantiles(0.9, 1.0, 1.1),
    forward=0.3,
    backward=0.6,
    optimizer=0.1,
    layers=(
        LayerShare("a", 0.1, 0.0, input_bytes=16, grad_output_bytes=40, grad_weight_bytes=2),
        LayerShare("b", 0.2, 0.1, input_bytes=80, grad_output_bytes=50, grad_weight_bytes=10),
        LayerShare("c", 0.1, 0.1, input_bytes=300, grad_output_bytes=10, grad_weight_bytes=0),
    ),
    read_bandwidth=1000.0,
    write_bandwidth=500.0,
)


@pytest.mark.parametrize(
    ("active", "stopped", "saved"),
    [
        ({"a": 10, "b": 10, "c": 10}, "a", 0.0),
        # a: 5/10 of 0.1 is more than 0.016 + 0.5 * 0.040 + 0.004
        ({"a": 5, "b": 10, "c": 10}, "a", 0.05),
        # a: 1/10 of 0.1 is less than 0.016 + 0.1 * 0.040 + 0.004
        ({"a": 1, "b": 10, "c": 10}, "a", 0.1 - 0.024),
        # b: 0.080 + 0.2 * 0.050 + 0.020; c: its input alone takes longer than its whole wgrad did
        ({"a": 10, "b": 2, "c": 1}, "a", 0.2 - 0.11),
        # Nothing of a layer that is skipped is read
        ({"a": 0, "b": 0, "c": 10}, "abc", 0.1 + 0.2 + 0.1 + 0.1),
    ],
)
def test_hand_worked_floors(active, stopped, saved):
    now = counted(active, stopped)
    assert bound(READ, now, floor=True) == pytest.approx(1 / (1 - saved))
    assert bound(READ, now, floor=True) <= bound(READ, now) + 1e-12


READ_B = replace(READ, layers=READ.layers[1:2])
LINED = replace(
    READ, layers=(replace(READ.layers[1], lines=ChannelLines(pixels=2, channels=10, line=5)),)
)


@pytest.mark.parametrize(
    ("active", "lines"), [([0], 0.5), ([0, 1, 4], 0.5), ([4, 5], 1.0), ([], 0.0)]
)
def test_the_floor_reads_whole_lines(active, lines):
    mask = torch.zeros(10, dtype=torch.bool)
    mask[active] = True
    now = replace(counted({"b": len(active)}), masks={"b": mask})
    # b: 0.080 + lines * 0.050 + 0.020, and nothing with none active
    floor = 0.1 + lines * 0.05 if active else 0.0
    assert bound(LINED, now, floor=True) == pytest.approx(1 / (1 - (0.2 - floor)))
    assert bound(LINED, now, floor=True) <= bound(LINED, now)
    assert bound(LINED, now, floor=True) <= bound(READ_B, now, floor=True)
    # A mask of other channels, as of a product of several calls, says nothing of lines.
    other = replace(now, masks={"b": mask.repeat(2)})
    assert bound(LINED, other, floor=True) == bound(READ_B, now, floor=True)


def test_shares_saved_without_lines_have_the_floor_of_planes():
    saved = json.loads(json.dumps(LINED.to_dict()))
    assert StepShares.from_dict(saved) == LINED
    for layer in saved["layers"]:
        del layer["lines"]
    older = StepShares.from_dict(saved)
    assert older == READ_B
    mask = torch.arange(10) == 3
    now = replace(counted({"b": 1}), masks={"b": mask})
    assert bound(older, now, floor=True) == pytest.approx(1 / (1 - (0.2 - 0.105)))


@pytest.mark.parametrize(
    ("format", "touched"), [(torch.channels_last, 1.0), (torch.contiguous_format, 1 / 16)]
)
def test_the_memory_format_decides_what_is_read(format, touched):
    model = neq.convert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 32)))
    model.to(memory_format=format)
    batches = [(x.contiguous(memory_format=format), y) for x, y in BATCHES]
    shares = backward_shares(model, batches, cross_entropy, warmup=0, repeats=1)
    conv, linear = sorted(shares.layers, key=lambda layer: layer.name)
    model[0].channels.set([5])
    model[2].channels.set(range(16, 32))
    now = flops.count(model, BATCHES[0])
    assert conv.grad_output_share(now.masks["0"]) == touched
    assert linear.grad_output_share(now.masks["2"]) == 0.5
    assert bound(shares, now, floor=True) <= bound(shares, now)
    assert StepShares.from_dict(json.loads(json.dumps(shares.to_dict()))) == shares


def test_a_layer_whose_calls_differ_has_no_lines():
    def lines(rows: int) -> ChannelLines | None:
        twice = lambda model, x: model(x).sum() + model(x[:rows]).sum()  # noqa: E731
        model, batches = nn.Sequential(nn.Linear(32, 32)), [torch.randn(4, 32)]
        return backward_shares(model, batches, twice, warmup=0, repeats=1).layers[0].lines

    assert lines(4) == ChannelLines(pixels=4, channels=32, line=16)
    assert lines(2) is None


def test_rescaled_to_another_measurement():
    phases = {"forward": 2.0, "backward": 6.0, "optimizer": 2.0}
    got = READ.rescaled(Quantiles(9.0, 10.0, 11.0), phases, wgrad=3.0)
    assert got.wgrad == pytest.approx(0.3)
    assert (got.forward, got.backward, got.optimizer) == (0.2, 0.6, 0.2)
    # Each layer keeps its part of the weight gradients, and of the rest of backward.
    assert got.layers[1].wgrad == pytest.approx(0.3 * 0.2 / 0.4)
    assert got.layers[1].dgrad == pytest.approx(0.3 * 0.1 / 0.2)
    assert got.seconds.median == 10.0
    assert got.layers[1].input_bytes == READ.layers[1].input_bytes


def test_shares_saved_without_bytes_have_no_floor():
    saved = json.loads(json.dumps(SHARES.to_dict()))
    del saved["read_bandwidth"], saved["write_bandwidth"]
    for layer in saved["layers"]:
        del layer["input_bytes"], layer["grad_output_bytes"], layer["grad_weight_bytes"]
    older = StepShares.from_dict(saved)
    assert older == SHARES
    now = counted({"a": 10, "b": 5, "c": 10})
    assert bound(older, now) == pytest.approx(1 / (1 - 0.1))
    with pytest.raises(ValueError, match="ones saved without"):
        bound(older, now, floor=True)


def test_bytes_are_those_of_one_step():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    shares = backward_shares(model, BATCHES, cross_entropy, warmup=0, repeats=1)
    conv, linear = sorted(shares.layers, key=lambda layer: layer.name)
    assert (conv.input_bytes, conv.grad_output_bytes) == (4 * 2 * 3 * 64, 4 * 2 * 4 * 36)
    assert (linear.input_bytes, linear.grad_output_bytes) == (4 * 2 * 4 * 36, 4 * 2 * 5)
    assert conv.grad_weight_bytes == 4 * 4 * 3 * 9
    assert linear.grad_weight_bytes == 4 * 5 * 4 * 36
    assert shares.read_bandwidth > 0
    assert shares.write_bandwidth > 0


def test_bytes_of_a_layer_called_twice_add_up():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    batches = [torch.randn(2, 8)]
    shares = backward_shares(model, batches, lambda m, b: m(b).sum(), warmup=0, repeats=1)
    assert shares.layers[0].input_bytes == 2 * 4 * 2 * 8


def test_layers_that_run_in_training_only_are_taken_as_active():
    seen = counted({"a": 10, "b": 5})
    now = FlopCount(seen.layers, not_called=("c",))
    assert bound(SHARES, now) == pytest.approx(1 / (1 - 0.1))


def test_a_layer_outside_the_loss_has_no_share():
    class TwoHeads(CifarResNet):
        def __init__(self):
            super().__init__(8)
            self.auxiliary = nn.Linear(3 * 8 * 8, 2)

        def forward(self, x):
            return super().forward(x) + 0 * self.auxiliary(x.flatten(1)).detach().sum()

    shares = backward_shares(TwoHeads(), BATCHES, cross_entropy, warmup=0, repeats=1)
    assert "auxiliary" not in {layer.name for layer in shares.layers}
    assert "linear" in {layer.name for layer in shares.layers}


def test_bound_wants_the_same_model_and_a_fraction():
    with pytest.raises(ValueError, match="no layer c"):
        bound(SHARES, counted({"a": 1, "b": 1}))
    with pytest.raises(ValueError, match="frozen_parameters"):
        bound(SHARES, counted({"a": 1, "b": 1, "c": 1}), 1.5)


def test_shares_survive_json():
    saved = json.loads(json.dumps(SHARES.to_dict()))
    assert StepShares.from_dict(saved) == SHARES
    assert saved["wgrad"] == pytest.approx(0.4)
    assert StepShares.from_dict(json.loads(json.dumps(READ.to_dict()))) == READ


def test_frozen_parameter_fraction_counts_elements():
    model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)))
    assert frozen_parameter_fraction(model) == 0
    model[0].channels.set([0])
    assert frozen_parameter_fraction(model) == pytest.approx(12 / 24)
    assert frozen_parameter_fraction(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"batches": []}, "batches"), ({"repeats": 0}, "repeats"), ({"warmup": -1}, "warmup")],
)
def test_bad_arguments_raise(arguments, message):
    arguments = {"model": CifarResNet(8), "batches": BATCHES, "loss": cross_entropy} | arguments
    with pytest.raises(ValueError, match=message):
        backward_shares(**arguments)


def test_a_model_without_layers_raises():
    model = nn.Sequential(nn.Flatten(), nn.PReLU())
    with pytest.raises(ValueError, match="no convolution, linear or norm layer got a gradient"):
        backward_shares(model, BATCHES, lambda m, b: m(b[0]).sum())
