"""What the kernels compute when the host's number of active channels is stale, as in the replay of
a CUDA graph. On a GPU a graph is captured and replayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels import ops
from neq_kernels.backends.problem import ConvGeometry, Problem, Strategy
from neq_kernels.dispatch.selection import selector
from tests.support.backends import triton
from tests.support.gpu_cases import EXECUTOR, MASKS, assert_gradient, channels, poison


@pytest.mark.parametrize("now", MASKS)
@pytest.mark.parametrize("then", ["none", "one", "all"])
@pytest.mark.parametrize("groups", [None, 1, 2, 4], ids=["linear", "conv", "grouped", "depthwise"])
def test_the_count_on_the_device_decides(groups, then, now, device):
    poison(device)
    with neq.capturable():
        check(groups, then, now, device)


@pytest.mark.parametrize("groups", [None, 1], ids=["linear", "conv"])
def test_what_was_rehearsed_is_captured(groups, device, monkeypatch, caplog):
    """And what was not is captured densely, with one warning for each problem."""
    monkeypatch.setattr(selector.rehearsal, "_rehearsed", {})
    used, backend = [], triton.linear_backward if groups is None else triton.conv_backward

    def counted(*arguments, **more):
        used.append(more["choice"].strategy)
        return backend(*arguments, **more)

    monkeypatch.setattr(triton, backend.__name__, counted)
    monkeypatch.setattr(selector.rehearsal, "captures", lambda tensor: True)
    check(groups, "all", "random", device)
    assert "warm up within neq_kernels.capturable()" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(triton, backend.__name__, counted)
    with neq.capturable():
        check(groups, "all", "one", device)
    monkeypatch.setattr(selector.rehearsal, "captures", lambda tensor: True)
    check(groups, "all", "random", device)
    assert used == [Strategy.DENSE, Strategy.CUSTOM, Strategy.CUSTOM]


def test_the_kernel_of_the_table_is_rehearsed(device, monkeypatch):
    """Its settings are those that won with everything active."""
    problem = Problem((50, 16), (8, 16), None, False, torch.float16)
    monkeypatch.setattr(selector.rehearsal, "_rehearsed", {})
    chosen = list(selector.candidates(problem, 8, selector.context(device)))[-1]
    assert chosen.settings
    monkeypatch.setattr(selector, "choice", lambda *_: chosen)
    given, backend = [], triton.linear_backward
    monkeypatch.setattr(
        triton,
        "linear_backward",
        lambda *a, **m: (given.append(m["choice"].settings), backend(*a, **m))[1],
    )
    channels_now = channels(8, "random")
    active = channels_now.order(device), channels_now.count(device), channels_now.host_count
    generator = torch.Generator().manual_seed(0)
    shapes = ((50, 8), (50, 16), (8, 16))
    dy, x, weight = (torch.randn(s, generator=generator).half() for s in shapes)
    with neq.capturable():
        _, grad, _ = ops.linear_backward(
            dy.to(device), x.to(device), x.shape, weight.to(device), active, [True] * 3, False
        )
    assert_gradient(grad, dy.double().t() @ x.double(), channels_now, 50)
    assert given == [chosen.settings]
    assert list(selector.rehearsal._rehearsed.values()) == [chosen]


def check(groups, then, now, device) -> None:
    k, generator = 8, torch.Generator().manual_seed(0)
    chosen = channels(k, now)
    active = chosen.order(device), chosen.count(device), channels(k, then).host_count
    x = torch.randn(2, 4, 5, 5, generator=generator)
    dy = torch.randn(2, k, 5, 5, generator=generator)
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
    with torch.cuda.stream(stream), neq.capturable():
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
