"""Layers of every type, small models of them, and what their gradients should be."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import neq_kernels as neq
from tests.support import oracle

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
    "sync_batch_norm": (lambda: nn.SyncBatchNorm(6), (3, 6, 4, 4)),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (3, 6, 5)),
    "instance_norm2d tracked": (
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        (3, 6, 4, 4),
    ),
    "instance_norm3d unbatched": (lambda: nn.InstanceNorm3d(6, affine=True), (6, 2, 3, 2)),
    "rms_norm": (lambda: nn.RMSNorm(6), (3, 4, 6)),
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


def calls_of_a_step(model, x):
    x = x.clone().requires_grad_()
    with oracle.CalledOps() as called:
        model(x).sum().backward()
    return called.that_compute()


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )


def frozen_net(**options):
    model = neq.convert(net(), **options)
    model[0].channels.set([0, 3])
    model[4].channels.set([])
    return model


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class Tied(nn.Module):
    """Two layers, one weight; each has its own bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())
