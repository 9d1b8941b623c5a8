"""Every product with a parameter is counted, whatever function makes it, and laid at the door of
the layer that owns the parameter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import neq_kernels as neq
from neq_kernels.measure import flops
from tests.support.models import product

B, CIN, K = 3, 4, 5


class Times(nn.Module):
    """``product(x, w)`` with a parameter of the given shape."""

    def __init__(self, product, *shape: int) -> None:
        super().__init__()
        self.product, self.w = product, nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.product(x, self.w)


def mask(w: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(w)).view(-1, *[1] * (w.dim() - 1)) < 2


OFFSETS = torch.tensor([1, B], dtype=torch.int32)
DENSE = B * CIN * K
EXPERTS = 2
PRODUCTS = {
    "matmul": (lambda x, w: x @ w, (CIN, K), DENSE),
    "of a transpose": (lambda x, w: x @ w.t(), (K, CIN), DENSE),
    "of mT": (lambda x, w: torch.matmul(x, w.mT), (K, CIN), DENSE),
    "of a cast": (lambda x, w: x.double() @ w.double(), (CIN, K), DENSE),
    "of a part": (lambda x, w: x @ w[:, :2], (CIN, K), B * CIN * 2),
    "of an indexed part": (lambda x, w: x @ w[x.argmax(1).max() * 0], (2, CIN, K), DENSE),
    "of masked rows": (lambda x, w: x @ torch.where(mask(w), w, w.detach()).t(), (K, CIN), DENSE),
    "of a normed weight": (lambda x, w: F.linear(x, F.normalize(w)), (K, CIN), DENSE),
    "of a scaled weight": (lambda x, w: x @ (w * 2.0), (CIN, K), DENSE),
    "from the left": (lambda x, w: w @ x.t(), (K, CIN), DENSE),
    "mm": (torch.mm, (CIN, K), DENSE),
    "aten": (torch.ops.aten.mm, (CIN, K), DENSE),
    "mv": (lambda x, w: torch.mv(x, w), (CIN,), B * CIN),
    "addmm": (lambda x, w: torch.addmm(x.new_zeros(K), x, w), (CIN, K), DENSE),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 1), (CIN, 2, K), 2 * DENSE),
    "bmm": (
        lambda x, w: torch.bmm(x.expand(EXPERTS, B, CIN), w),
        (EXPERTS, CIN, K),
        EXPERTS * DENSE,
    ),
    "baddbmm": (
        lambda x, w: torch.baddbmm(x.new_zeros(1, 1, 1), x.expand(EXPERTS, B, CIN), w),
        (EXPERTS, CIN, K),
        EXPERTS * DENSE,
    ),
    "addbmm": (
        lambda x, w: torch.addbmm(x.new_zeros(1, 1), x.expand(EXPERTS, B, CIN), w),
        (EXPERTS, CIN, K),
        EXPERTS * DENSE,
    ),
    "grouped_mm": (
        lambda x, w: F.grouped_mm(x.bfloat16(), w.bfloat16(), offs=OFFSETS),
        (EXPERTS, CIN * 2, 8),
        B * CIN * 2 * 8,
    ),
    "einsum": (lambda x, w: torch.einsum("bi,eio->beo", x, w), (2, CIN, K), 2 * DENSE),
    "einsum of many": (
        lambda x, w: torch.einsum("...i,io,o->...o", x, w, x.new_ones(K)),
        (CIN, K),
        DENSE,
    ),
    "einsum by lists": (lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]), (CIN, K), DENSE),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (K, CIN, CIN), DENSE * CIN),
    "attention to learned keys": (
        lambda x, w: F.scaled_dot_product_attention(x, w, x.new_zeros(K, 2)),
        (K, CIN),
        DENSE,
    ),
    "linear_cross_entropy": (
        lambda x, w: F.linear_cross_entropy(x, w, torch.zeros(B, dtype=torch.long)),
        (K, CIN),
        DENSE,
    ),
}
if not hasattr(F, "linear_cross_entropy"):  # before PyTorch 2.14
    del PRODUCTS["linear_cross_entropy"]
if not hasattr(F, "grouped_mm"):
    del PRODUCTS["grouped_mm"]


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_with_a_parameter(name):
    product, shape, macs = PRODUCTS[name]
    model = nn.Sequential(nn.Identity(), Times(product, *shape))
    width = CIN * 2 if name == "grouped_mm" else CIN
    count = flops.count(model, torch.randn(B, width))
    (row,) = count.layers
    assert (row.name, row.parameter, row.macs) == ("1.w", "1.w", macs // B)
    assert row.neurons == row.active == shape[0]
    assert row.wgrad_macs == row.macs
    assert not row.owned


def test_a_product_with_a_copy_without_gradients_has_no_weight_gradient():
    count = flops.count(Times(lambda x, w: x @ w.detach().clone(), CIN, K), torch.randn(B, CIN))
    assert (count.layers[0].parameter, count.macs, count.wgrad) == ("w", CIN * K, 0)


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.LSTM(CIN, K), 4 * K * (CIN + K)),
        (nn.GRU(CIN, K, num_layers=2), 3 * K * (CIN + K + 2 * K)),
        (nn.RNN(CIN, K, bidirectional=True, batch_first=True), 2 * K * (CIN + K)),
        (nn.LSTM(CIN, K, proj_size=2), 4 * K * (CIN + 2) + 2 * K),
        (nn.LSTMCell(CIN, K), 4 * K * (CIN + K)),
        (nn.GRUCell(CIN, K), 3 * K * (CIN + K)),
        (nn.RNNCell(CIN, K, nonlinearity="relu"), K * (CIN + K)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_recurrent_layers(layer, macs):
    steps = 1 if isinstance(layer, nn.RNNCellBase) else 7
    shape = (B, CIN) if steps == 1 else (B, 7, CIN)
    if steps > 1 and not layer.batch_first:
        shape = (7, B, CIN)
    batch = shape[0]
    count = flops.count(layer, torch.randn(shape))
    assert count.macs == macs * steps * B // batch
    assert {row.kind for row in count.layers} == {"recurrent"}
    assert {row.parameter for row in count.layers} == {
        name for name, p in layer.named_parameters() if p.dim() == 2
    }
    first, second = count.layers[:2]
    assert first.dgrad_macs == 0
    assert second.dgrad_macs == (second.macs if steps > 1 else 0)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, CIN), torch.randn(2, CIN)])
    if steps > 1:
        recorder = flops.Recorder(layer)
        with recorder.watching(packed):
            layer(packed)
        assert sum(call.macs for call in recorder.calls) == 6 * macs


def test_products_between_activations_are_not_counted():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.latent = nn.Linear(4, 12), nn.Parameter(torch.randn(2, 4))
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            q, k, v = self.qkv(torch.cat([self.latent.expand(len(x), -1, -1), x], 1)).chunk(3, -1)
            q = q * self.scale
            attention = (q @ k.transpose(-2, -1)).softmax(-1)
            return torch.einsum("bqk,bkc->bqc", attention, v) @ v.mT

    (row,) = flops.count(Attention(), torch.randn(1, 3, 4)).layers
    assert (row.name, row.macs) == ("qkv", 5 * 4 * 12)


def test_a_learned_query_is_an_activation_once_it_is_projected():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.q = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.q(self.query) @ x.mT

    rows = flops.count(Pool(), torch.randn(1, 3, 4)).layers
    assert [(row.name, row.macs) for row in rows] == [("q", 2 * 4 * 4)]


def test_tokens_are_data_and_a_head_tied_to_their_table_is_a_product():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)

        def forward(self, ids):
            x = self.embed(ids)
            return (x @ x.mT) @ x @ self.embed.weight.t()

    (row,) = flops.count(Tied(), torch.zeros(1, 3, dtype=torch.long)).layers
    assert (row.name, row.parameter, row.macs) == ("embed", "embed.weight", 3 * 4 * 7)


def test_a_merged_low_rank_update_is_still_the_layers_weight():
    class Lora(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4, bias=False)
            self.a, self.b = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(4, 2))

        def forward(self, x):
            return x @ (self.weight + self.b @ self.a).t()

    rows = flops.count(Lora(), torch.randn(1, 4)).layers
    assert [(row.parameter, row.macs) for row in rows] == [("a", 4 * 2 * 4), ("weight", 16)]


class Mixed(nn.Module):
    """An expert product, a recurrent layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.rnn = nn.Parameter(torch.randn(8, 16, 64)), nn.LSTM(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.rnn(torch.einsum("bi,eio->beo", x, self.up))[0])


def test_what_no_neuron_owns_is_in_the_total_and_named():
    model = neq.convert(Mixed(), filter=lambda name, _: name == "head")
    model.head.channels.set([])
    count = flops.count(model, torch.randn(4, 16))
    up, rnn, head = 8 * 16 * 64, 8 * 4 * 64 * (64 + 64), 8 * 64 * 4
    assert count.macs == up + rnn + head
    assert count.owned == pytest.approx(head / count.macs)
    assert flops.frozen_fraction(model, count) == pytest.approx(head / count.macs)
    assert [row.parameter for row in count.unowned] == [
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "up",
    ]


class Functional(nn.Module):
    """Multiplies by the weight of ``qkv`` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x):
        return self.out(product(x, self.qkv))


def test_a_layer_that_is_bypassed_saves_nothing():
    model = neq.convert(Functional())
    for layer in (model.qkv, model.out):
        layer.channels.set([])
    count = flops.count(model, torch.randn(4, 16))
    qkv, out = count.layers
    assert (qkv.bypassed_macs, qkv.wgrad_macs, qkv.active_share) == (qkv.macs, qkv.macs, 1)
    assert out.wgrad_macs == out.bypassed_macs == 0
    assert count.paper == 2 * qkv.macs
    assert flops.frozen_fraction(model, count) == pytest.approx(0.5)
    assert count.unowned == (qkv,)
    assert count.owned == pytest.approx(0.5)


def test_a_layer_that_is_called_and_bypassed_saves_half():
    class Both(Functional):
        def forward(self, x):
            return super().forward(x) + self.out(self.qkv(x))

    model = neq.convert(Both())
    model.qkv.channels.set(range(12))
    count = flops.count(model, torch.randn(4, 16))
    qkv = count.layers[0]
    assert qkv.macs == 2 * qkv.bypassed_macs
    assert qkv.wgrad_macs == qkv.bypassed_macs * 5 // 4
    assert qkv.active_share == pytest.approx((1 + 1 / 4) / 2)


def test_functions_of_ours_do_not_bypass():
    class Ours(Functional):
        def forward(self, x):
            layer = self.qkv
            return self.out(neq.functional.linear(x, layer.weight, layer.bias, layer.channels))

    for active in (range(48), range(12), []):
        model = neq.convert(Ours())
        model.qkv.channels.set(active)
        qkv = flops.count(model, torch.randn(4, 16)).layers[0]
        assert (qkv.name, qkv.bypassed_macs) == ("qkv", 0)
        assert qkv.active == len(active)


class Scaled(Functional):
    """Reads a weight where convert sees it, but multiplies by something computed from it."""

    def forward(self, x):
        return self.out(F.linear(x, self.qkv.weight * 2))


@pytest.mark.parametrize(("active", "wgrad"), [(range(48), 1), (range(12), 1), ([], 0)])
def test_gradients_of_masked_weights_are_computed_whole(active, wgrad):
    model = neq.convert(Scaled())
    model.qkv.channels.set(active)
    qkv = flops.count(model, torch.randn(4, 16)).layers[0]
    assert (qkv.name, qkv.bypassed_macs, qkv.active) == ("qkv", 0, len(active))
    assert qkv.wgrad_macs == wgrad * qkv.macs
    layer = neq.convert(nn.Bilinear(4, 4, 48))
    layer.channels.set(active)
    (row,) = flops.count(layer, {"input1": torch.ones(2, 4), "input2": torch.ones(2, 4)}).layers
    assert (row.bypassed_macs, row.active) == (0, len(active))
    assert row.wgrad_macs == wgrad * row.macs


def test_a_weight_that_is_read_for_a_linear_product_saves_what_its_layer_does():
    class Read(Functional):
        def forward(self, x):
            return self.out(F.linear(x, self.qkv.weight, self.qkv.bias))

    model = neq.convert(Read())
    model.qkv.channels.set(range(12))
    qkv = flops.count(model, torch.randn(4, 16)).layers[0]
    assert (qkv.name, qkv.bypassed_macs, qkv.wgrad_macs) == ("qkv", 0, qkv.macs // 4)


def test_weights_that_do_not_learn_bypass_nothing():
    model = neq.convert(Functional())
    model.qkv.requires_grad_(False)
    qkv = flops.count(model, torch.randn(4, 16)).layers[0]
    assert qkv.bypassed_macs == qkv.wgrad_macs == qkv.active_share == 0


def test_computed_weights_belong_to_their_layer():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    (row,) = flops.count(nn.Sequential(layer), torch.randn(1, 4)).layers
    assert (row.name, row.neurons) == ("0", 4)
    assert row.parameter == "0.parametrizations.weight.original1"
