"""Embeddings: gradients of the active tokens only, by as much work as they take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import neq_kernels as neq
from neq_kernels.autograd import embedding as autograd_embedding
from tests.support import oracle
from tests.support.layer_cases import through_a_file

ROWS, WIDTH = 11, 4
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "padding from the end": {"padding_idx": -1},
    "scaled by frequency": {"scale_grad_by_freq": True, "padding_idx": 5},
    "sparse": {"sparse": True, "padding_idx": 2},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
SOME = [0, 2, 5, 9, 10]


def twins(active=SOME, dtype=torch.float64, **options):
    plain = nn.Embedding(ROWS, WIDTH, **options).to(dtype)
    ours = neq.convert(copy.deepcopy(plain))
    ours.channels.set(active)
    return plain, ours


def tokens(*shape, dtype=torch.int64):
    return torch.randint(0, ROWS, shape, dtype=dtype)


def both_backwards(plain, ours, x):
    outs = [layer(x) for layer in (plain, ours)]
    assert torch.equal(*outs)
    dy = torch.randn_like(outs[0])
    for out in outs:
        out.backward(dy)


@every_option
@pytest.mark.parametrize("active", [SOME, [3], range(ROWS), [4, 7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_active_rows_have_pytorchs_bits_and_frozen_ones_none(options, active, dtype):
    plain, ours = twins(torch.tensor(list(active)), dtype, **options)
    both_backwards(plain, ours, tokens(20, 3))
    gradient, dense = ours.weight.grad, plain.weight.grad
    assert gradient.layout == dense.layout
    mask = ours.channels.mask
    assert torch.equal(gradient.to_dense()[mask], dense.to_dense()[mask])
    assert bool((gradient.to_dense()[~mask] == 0).all())
    if gradient.is_sparse:
        assert set(gradient.coalesce().indices()[0].tolist()) <= set(active)


@every_option
def test_without_waiting_for_the_device(options, monkeypatch):
    """As on a GPU: nothing reads how many positions are active."""
    _, ours = twins(**options)
    x, dy = tokens(20, 3), torch.randn(20, 3, WIDTH, dtype=torch.float64)
    lookup = autograd_embedding.Lookup(ours.padding_idx, ours.scale_grad_by_freq, ours.sparse)
    results = []
    for on_cpu in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cpu", on_cpu)
        results.append(autograd_embedding._active_rows(dy, x, ours.channels, lookup).to_dense())
    assert bool(results[0].any())
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shapes_of_tokens(shape, dtype):
    plain, ours = twins()
    both_backwards(plain, ours, tokens(*shape, dtype=dtype))
    dense = oracle.zero_frozen(plain.weight.grad, ours.channels.mask.tolist())
    assert torch.equal(ours.weight.grad, dense)


class AddedUp(TorchDispatchMode):
    """How many positions each backward of a lookup adds up."""

    def __init__(self):
        super().__init__()
        self.positions = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.embedding_dense_backward.default:
            self.positions.append(args[1].numel())
        return func(*args, **(kwargs or {}))


def test_only_positions_with_active_tokens_are_added_up():
    """Of 1000 positions the 3 that hold the one active token."""
    _, ours = twins([7])
    x = torch.zeros(1000, dtype=torch.int64)
    x[[1, 10, 100]] = 7
    with AddedUp() as added:
        ours(x).sum().backward()
    assert added.positions == [3]


@pytest.mark.usefixtures("stock_algorithms")
@pytest.mark.parametrize("options", [{}, {"sparse": True}])
def test_with_everything_active_a_step_is_pytorchs_own_calls(options):
    plain, ours = twins(range(ROWS), **options)
    called = []
    for layer in (plain, ours):
        with oracle.CalledOps() as ops:
            layer(tokens(4)).sum().backward()
        called.append(ops.that_compute())
    assert called[0] == called[1]


def test_wholly_frozen():
    plain, ours = twins([])
    x = tokens(4, 3)
    out = ours(x)
    assert torch.equal(out, plain(x))
    assert not out.requires_grad
    model = nn.Sequential(ours, neq.convert(nn.Linear(WIDTH, 2).double()))
    model(x).sum().backward()
    assert ours.weight.grad is None


def test_a_nan_in_a_frozen_tokens_gradient_stays_there():
    _, ours = twins([1])
    out = ours(torch.tensor([1, 3, 1]))
    out.backward(torch.tensor([[1.0], [float("nan")], [2.0]], dtype=torch.float64).expand(3, WIDTH))
    assert torch.equal(ours.weight.grad[1], torch.full((WIDTH,), 3.0, dtype=torch.float64))
    assert bool((ours.weight.grad[3] == 0).all())


def test_a_mask_changed_before_backward_is_an_error():
    for active in (SOME, range(ROWS)):
        _, ours = twins(active)
        out = ours(tokens(4))
        ours.channels.set([1])
        with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
            out.sum().backward()


def penalty(layer, rows, x):
    """A gradient penalty through the table, as adversarial training on embeddings has it."""
    readout = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    score = (layer(x) @ readout).tanh().sum() + (layer(x) ** 3).sum()
    (gradient,) = torch.autograd.grad(score, rows, create_graph=True)
    return gradient.square().sum() + score


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}])
def test_second_derivatives_with_frozen_rows_as_constants(options):
    plain, ours = twins(**options)
    x = tokens(20)
    penalty(ours, ours.weight, x).backward()
    # Frozen rows are constants: the dense table is put together of two parameters.
    mask = ours.channels.mask
    active = plain.weight.detach().clone().requires_grad_()
    table = torch.where(mask.unsqueeze(1), active, plain.weight.detach())

    def dense(tokens_):
        return nn.functional.embedding(tokens_, table, plain.padding_idx)

    penalty(dense, active, x).backward()
    oracle.assert_close64(ours.weight.grad, active.grad, 1e-12)
    assert bool((ours.weight.grad[~mask] == 0).all())


@pytest.mark.parametrize("active", [SOME, [], range(ROWS)])
def test_compiled(active):
    plain, ours = twins(active, padding_idx=2)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = tokens(5, 3)
    assert torch.equal(compiled(x), plain(x))
    dy = torch.randn(5, 3, WIDTH, dtype=torch.float64)
    compiled(x).backward(dy)
    plain(x).backward(dy)
    mask = ours.channels.mask.tolist()
    assert torch.equal(ours.weight.grad, oracle.zero_frozen(plain.weight.grad, mask))
    ours.zero_grad()
    ours.channels.set([1, 8])
    compiled(x).backward(dy)
    dense = oracle.zero_frozen(plain.weight.grad, ours.channels.mask.tolist())
    assert torch.equal(ours.weight.grad, dense)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"neq\.nn\.Embedding: .*max_norm: .*use torch.nn.Emb"):
        neq.nn.Embedding(4, 3, max_norm=1.0)
    table = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="channels: expected 4 channels, got 3"):
        neq.functional.embedding(torch.tensor([1]), table, neq.ActiveChannels(3))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_copies_repr_and_revert(copied):
    ours = copied(twins()[1])
    assert repr(ours) == f"Embedding({ROWS}, {WIDTH}, active=5/{ROWS})"
    assert ours.neuron_parameters() == [(ours.weight, neq.NeuronLayout())]
    assert type(neq.revert(ours)) is nn.Embedding
    assert vars(ours).keys() == vars(nn.Embedding(ROWS, WIDTH)).keys()


def test_from_pretrained():
    table = torch.randn(5, 3)
    ours = neq.nn.Embedding.from_pretrained(table, freeze=False)
    ours.channels.set([2])
    ours(torch.tensor([2, 3])).sum().backward()
    assert ours.weight.grad.any(1).tolist() == [False, False, True, False, False]


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1),
}


@pytest.mark.filterwarnings("ignore:.*has no row per neuron:UserWarning")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_rows_do_not_move(make):
    plain, ours = twins()
    optimizers = [make(layer.parameters()) for layer in (plain, ours)]
    neq.attach(optimizers[1], ours)
    before = ours.weight.detach().clone()
    for _ in range(3):
        x = tokens(30)
        for layer, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    mask = ours.channels.mask
    assert torch.equal(ours.weight.detach()[~mask], before[~mask])
    oracle.assert_close64(ours.weight[mask], plain.weight[mask], 1e-12)
    assert bool((ours.weight.detach() != before)[mask].any(1).all())


@pytest.mark.filterwarnings("ignore:.*has no row per neuron:UserWarning")
@pytest.mark.parametrize("make", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradients_take_the_guard(make):
    plain, ours = twins(sparse=True)
    optimizers = [make(layer.parameters(), lr=0.1) for layer in (plain, ours)]
    handle = neq.attach(optimizers[1], ours)
    before = ours.weight.detach().clone()
    for _ in range(3):
        x = tokens(30)
        for layer, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    assert [update.update for update in handle.report()] == ["guard"]
    mask = ours.channels.mask
    assert torch.equal(ours.weight.detach()[~mask], before[~mask])
    oracle.assert_close64(ours.weight[mask], plain.weight[mask], 1e-12)


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, tokens):
        return super().forward(tokens) * 3


class Positions(nn.Embedding):
    """As OPT's: rows by a running count, and an argument of another name."""

    def forward(self, attention_mask, offset=0):
        return super().forward(attention_mask.cumsum(1) + offset)


class ByItself(nn.Embedding):
    def forward(self, tokens):
        return nn.functional.embedding(tokens, self.weight * 2)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ByItself, (torch.tensor([[1, 3, 3]]),)),
        (Scaled, (torch.tensor([[1, 3, 3]]),)),
        (Positions, (torch.ones(2, 3, dtype=torch.long), 1)),
    ],
)
def test_a_subclass_with_its_own_forward(kind, arguments):
    plain = kind(ROWS, WIDTH).double()
    ours = neq.convert(copy.deepcopy(plain))
    assert isinstance(ours, kind)
    assert ours.is_embedding
    assert torch.equal(ours(*arguments), plain(*arguments))
    ours.channels.set([1, 2, 4])
    for layer in (plain, ours):
        layer(*arguments).square().sum().backward()
    mask = ours.channels.mask
    oracle.assert_close64(ours.weight.grad[mask], plain.weight.grad[mask], 1e-12)
    assert not ours.weight.grad[~mask].any()
    ours.channels.set([])
    assert not ours(*arguments).requires_grad
    assert type(neq.revert(ours)) is kind


def test_a_head_tied_to_a_scaled_embedding_shares_its_neurons():
    model = nn.Sequential(Scaled(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False))
    model[1].weight = model[0].weight
    neq.convert(model)
    assert model[0].channels is model[1].channels
    model[0].channels.set([0, 5])
    model(torch.tensor([0, 1, 5])).square().sum().backward()
    assert model[0].weight.grad.any(1).nonzero().flatten().tolist() == [0, 5]


def test_a_subclass_with_its_own_forward_stays_a_layer_in_a_trace():
    model = neq.convert(nn.Sequential(Scaled(ROWS, WIDTH)))
    traced = torch.fx.symbolic_trace(model)
    x = tokens(5)
    assert torch.equal(traced(x), model(x))


def test_sparse_gradients_of_a_subclass_that_looks_up_by_itself_are_refused():
    report = neq.conversion_report(nn.Sequential(ByItself(ROWS, WIDTH, sparse=True)))
    assert "sparse=True" in report.modules[0].reason
