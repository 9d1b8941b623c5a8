"""What one forward shows: the layers below each use of a parameter, and the first above."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import neq_kernels as neq
from neq_kernels.layers.dataflow import Dataflow
from tests.support.wiring import WIRINGS, Wired


def layers_below(model, x):
    bits = {getattr(model, name): 1 << i for i, name in enumerate("abcd")}
    with Dataflow(bits, [model.p]) as flow:
        model(x)
    return [
        None if below is None else "".join(n for i, n in enumerate("abcd") if below >> i & 1)
        for below in flow.below(model.p)
    ]


@pytest.mark.parametrize("name", WIRINGS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_wirings(name, mode):
    wiring, expected = WIRINGS[name]
    with mode():
        assert layers_below(Wired(wiring), torch.randn(4, 3)) == expected


@pytest.mark.parametrize("name", ["residual", "twice"])
def test_what_is_frozen_makes_no_difference(name):
    wiring, expected = WIRINGS[name]
    model = neq.convert(Wired(wiring))
    for layer in (model.a, model.b):
        layer.channels.set([])
    assert layers_below(model, torch.randn(4, 3)) == expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    model = Wired(lambda m, x: m.b(checkpoint(lambda y: m.a(y * m.p), x, use_reentrant=reentrant)))
    assert layers_below(model, torch.randn(4, 3, requires_grad=True)) == ["a"]


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert layers_below(Wired(WIRINGS["twice"][0]), torch.randn(4, 3)) == ["a", "ab"]


def test_a_sparse_tensor_on_the_way():
    model = Wired(lambda m, x: m.b(torch.sparse.mm((m.a(x) * m.p).to_sparse(), x)))
    assert layers_below(model, torch.randn(3, 3)) == ["ab"]


def test_compiled_blocks_on_the_way():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    scale = torch.compile(lambda x, p: (x * p).relu(), backend=counter, fullgraph=True)
    model = Wired(lambda m, x: m.b(scale(m.a(x), m.p)))
    model.a.compile(backend=counter, fullgraph=True)
    x = torch.randn(3, 3)
    for before in (0, 2):
        assert counter.frame_count == before
        assert layers_below(model, x) == ["ab"]
        model(x)
        assert counter.frame_count == 2
    torch._dynamo.reset()


def test_flex_attention_on_the_way():
    """An operator that takes functions."""

    def wiring(m, x):
        q = (m.a(x) * m.p)[None, None]
        return m.b(flex_attention(q, q, q)[0, 0])

    torch._dynamo.reset()
    model = Wired(wiring)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        assert layers_below(model, torch.randn(16, 3)) == ["ab"]
    torch._dynamo.reset()


def test_recording_changes_nothing():
    torch.manual_seed(0)
    plain = nn.Sequential(Wired(WIRINGS["skip"][0]), nn.BatchNorm1d(3), nn.Dropout(0.5))
    recorded = copy.deepcopy(plain)
    x = torch.randn(4, 3)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    with Dataflow({recorded[0].a: 1}, [recorded[0].p]):
        out = recorded(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for p, q in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    assert all(map(torch.equal, recorded.buffers(), plain.buffers()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in recorded.modules())


def test_activations_are_not_kept():
    import gc
    import weakref

    model = Wired(WIRINGS["stem"][0])
    freed = []

    def watch(layer, args, output):
        weakref.finalize(output, freed.append, output.shape)

    model.a.register_forward_hook(watch)
    with Dataflow({model.a: 1}, [model.p]) as flow, torch.no_grad():
        model(torch.randn(4, 3))
        gc.collect()
        assert freed == [(4, 3)]
    assert flow.called == 1
