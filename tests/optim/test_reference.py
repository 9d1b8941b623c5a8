"""The row functions themselves: precision, memory formats, and which implementation serves."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from neq_kernels.channels import WHOLE_PARAMETER, ActiveChannels, NeuronLayout
from neq_kernels.dispatch.selection import selector
from neq_kernels.optim import reference, row_steps
from tests.support.backends import cpu
from tests.support.row_functions import step_one

SGD_FLAGS = {
    "lr": 0.05,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.1,
    "nesterov": True,
    "maximize": False,
}
ADAM_FLAGS = {
    "lr": 0.05,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled": True,
    "maximize": False,
}
# torch's own optimizers under these settings.
TORCH = {
    "SGD": lambda ps: SGD(ps, **SGD_FLAGS),
    "AdamW": lambda ps: AdamW(ps, lr=0.05, betas=(0.9, 0.99), weight_decay=0.1),
}
IMPLEMENTATIONS = [None, *([cpu] if cpu.unavailable() is None else [])]
LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(
    params=IMPLEMENTATIONS,
    ids=lambda backend: "rows" if backend is None else backend.name,
    name="kernels",
)
def kernels_fixture(request):
    return request.param


def torch_run(make, weights, grads):
    p = torch.nn.Parameter(weights.clone())
    optimizer = make([p])
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def error(result, exact):
    return (result.double() - exact).abs().max()


@pytest.mark.parametrize("n", [1, 5, 8])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", TORCH)
def test_low_precision_is_no_worse_than_torchs_own(kernels, name, dtype, n):
    """Error against float64: at most twice that of torch in this dtype, and one rounding."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(8, 16, generator=generator, dtype=torch.float64).to(dtype)
    grads = torch.randn(10, 8, 16, generator=generator, dtype=torch.float64).to(dtype)
    channels = ActiveChannels(8)
    channels.set(torch.arange(8)[:n])
    p, layout = weights.clone(), NeuronLayout()
    state = [torch.zeros_like(p) for _ in range(2)]
    counts = torch.zeros(8, dtype=torch.int64)
    for grad in grads:
        where = channels.order(), n, layout
        if name == "SGD":
            step_one(kernels, "sgd_rows_", p, grad, (state[0], None), *where, **SGD_FLAGS)
        else:
            states = (*state, None, counts)
            step_one(kernels, "adam_rows_", p, grad, states, *where, **ADAM_FLAGS)
    make = TORCH[name]
    exact = torch_run(make, weights.double(), grads.double())[:n]
    own = torch_run(make, weights, grads)[:n]
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert error(p[:n], exact) <= 2 * error(own, exact) + rounding
    assert torch.equal(p[n:], weights[n:])


LAYOUTS = [
    ((6, 4), NeuronLayout()),
    ((6,), NeuronLayout()),
    ((6, 4, 3, 3), NeuronLayout()),
    ((6, 4, 2, 3, 3), NeuronLayout()),
    ((4, 6, 3), NeuronLayout(1, axis=1)),
    ((4, 6, 3, 3), NeuronLayout(1, axis=1)),
    ((4, 3, 3, 3), NeuronLayout(2, axis=1)),
    ((4, 3, 2, 3, 3), NeuronLayout(2, axis=1)),
    ((5, 7), WHOLE_PARAMETER),
    ((), WHOLE_PARAMETER),
]


def formats(shape):
    """The same numbers in every memory format that fits."""
    yield lambda t: t
    if len(shape) in (4, 5):
        form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        yield lambda t: t.contiguous(memory_format=form)
    if len(shape) >= 2:
        yield lambda t: t.mT.contiguous().mT  # dense, in an order of its own
        yield lambda t: t.repeat_interleave(2, -1)[..., ::2]  # with gaps


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
def test_every_layout_and_memory_format(shape, layout):
    """Against the neurons cut out by ``layout.gather`` and stepped by torch, one by one."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    channels = ActiveChannels(layout.n_neurons(weights))
    for active in ([0], list(range(len(channels))), list(range(0, len(channels), 2)), []):
        channels.set(active)
        expected = weights.clone()
        for k in active:
            index = torch.tensor([k])
            row = torch_run(
                lambda ps: Adam(ps, lr=0.05, amsgrad=True),
                layout.gather(weights, index),
                [layout.gather(grad, index)],
            )
            layout.scatter_(expected, index, row)
        for form in formats(shape):
            p, g, *state = (
                form(t.clone()) for t in (weights, grad, *[torch.zeros_like(weights)] * 3)
            )
            step_one(
                row_steps._backend([p, g, *state], layout),
                "adam_rows_",
                p,
                g,
                (*state, torch.zeros(len(channels), dtype=torch.int64)),
                channels.order(),
                len(active),
                layout,
                **{**ADAM_FLAGS, "weight_decay": 0.0, "beta2": 0.999},
            )
            torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)


def test_steps_may_be_absent_or_given_to_sgd(kernels):
    flags = {**SGD_FLAGS, "nesterov": False, "dampening": 0.5, "weight_decay": 0.0}
    p, grad, buffer = torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 2)
    counts = torch.tensor([0, 1, 0])
    order = torch.tensor([0, 1, 2])
    state = (buffer, counts)
    step_one(kernels, "sgd_rows_", p, grad, state, order, 2, NeuronLayout(), **flags)
    assert counts.tolist() == [1, 2, 0]
    assert buffer[:, 0].tolist() == [1.0, 0.5, 0.0]
    state = (buffer, None)
    step_one(kernels, "sgd_rows_", p, grad, state, order, 3, NeuronLayout(), **flags)
    assert counts.tolist() == [1, 2, 0]
    torch.testing.assert_close(buffer[:, 0], torch.tensor([1.4, 0.95, 0.5]))


def test_decay_of_frozen_neurons():
    t = torch.ones(4, 2)
    order = torch.tensor([1, 2, 0, 3])
    reference.decay_frozen_(t, order, 2, NeuronLayout(), 0.5)
    assert t[:, 0].tolist() == [0.5, 1.0, 1.0, 0.5]
    reference.decay_frozen_(t, order, 0, NeuronLayout(), 0.5)
    assert t[:, 0].tolist() == [0.25, 0.5, 0.5, 0.25]
    reference.decay_frozen_(t, order, 4, NeuronLayout(), 0.5)
    assert t[:, 0].tolist() == [0.25, 0.5, 0.5, 0.25]


def test_the_extension_serves_only_what_it_can(monkeypatch):
    serving = cpu if cpu.unavailable() is None else None
    monkeypatch.setattr(
        selector, "backends_for", lambda kind: ("aten" if serving is None else "cpu",)
    )
    p = torch.zeros(4, 3, 2, 2)
    last = p.contiguous(memory_format=torch.channels_last)
    layout = NeuronLayout()
    assert row_steps._backend([p, p], layout) is serving
    assert row_steps._backend([last, last], layout) is serving
    assert row_steps._backend([p, last], layout) is None
    # Where a dimension has one element, its stride says nothing about memory.
    pointwise = torch.zeros(4, 3, 1, 1)
    assert pointwise.stride() != (3, 1, 3, 3)
    assert (
        row_steps._backend([pointwise, pointwise.as_strided((4, 3, 1, 1), (3, 1, 3, 3))], layout)
        is serving
    )
    assert row_steps._backend([p, p.double()], layout) is None
    assert row_steps._backend([p.mT, p.mT], layout) is None
    assert row_steps._backend([p.to("meta"), p.to("meta")], layout) is None
    monkeypatch.setattr(selector, "backends_for", lambda kind: ("reference",))
    assert row_steps._backend([p, p], layout) is None
