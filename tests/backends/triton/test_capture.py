"""What the kernels compute when the host's number of active channels is stale, as in the replay of
a CUDA graph. On a GPU a graph is captured and replayed."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels import dispatch, ops
from neq_kernels.problem import ConvGeometry
from tests.backends.triton.cases import EXECUTOR, MASKS, assert_gradient, channels, poison


@pytest.mark.parametrize("now", MASKS)
@pytest.mark.parametrize("then", ["none", "one", "all"])
@pytest.mark.parametrize("groups", [None, 1, 2, 4], ids=["linear", "conv", "grouped", "depthwise"])
def test_the_count_on_the_device_decides(groups, then, now, device, monkeypatch):
    monkeypatch.setattr(dispatch, "captured", lambda tensor: True)
    k, generator = 8, torch.Generator().manual_seed(0)
    chosen = channels(k, now)
    active = chosen.order(device), chosen.count(device), channels(k, then).host_count
    x = torch.randn(2, 4, 5, 5, generator=generator)
    dy = torch.randn(2, k, 5, 5, generator=generator)
    poison(device)
    if groups is None:
        x, dy = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (x, dy))
        weight = torch.randn(k, 4, generator=generator)
        _, grad, bias = ops.linear_backward(
            dy.to(device), x.to(device), x.shape, weight.to(device), active, [True] * 3, False
        )
        exact = dy.double().t() @ x.double(), dy.double().sum(0)
    else:
        geometry = ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), groups)
        weight = torch.randn(k, 4 // groups, 3, 3, generator=generator)
        _, grad, bias = ops.conv_backward(
            *(dy.to(device), x.to(device), x.shape, weight.to(device)),
            geometry,
            active,
            [True] * 3,
            False,
        )
        tensors = (t.double() for t in (dy, x, weight))
        exact = geometry.backward(*tensors, (False, True, True))[1:]
    assert_gradient(grad, exact[0], chosen, dy.numel() // k)
    assert_gradient(bias, exact[1], chosen, dy.numel() // k)


def replay_on_a_gpu() -> None:
    """A graph captured once serves every mask: equal to eager with the same mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
    model = neq.convert(nn.Sequential(model, nn.Flatten(), nn.Linear(32 * 64, 10))).cuda()
    x = torch.randn(4, 8, 8, 8, device="cuda")
    parameters = list(model.parameters())

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(x).square().mean(), parameters))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Kernels cannot be loaded during a capture, so those of the captured path have to run before.
    with torch.cuda.stream(stream), mock.patch.object(dispatch, "captured", return_value=True):
        for _ in range(3):
            gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    for mask in ("random", "one", "all", "contiguous"):
        for layer in (model[0][0], model[0][1], model[2]):
            layer.channels.set(MASKS[mask](len(layer.channels)))
        graph.replay()
        for ours, eager in zip(captured, gradients(), strict=True):
            torch.testing.assert_close(ours, eager)


if EXECUTOR == "cuda":
    test_a_graph_serves_every_mask = replay_on_a_gpu
