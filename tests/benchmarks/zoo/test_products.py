"""Products with a parameter, counted by hand and by the dispatch mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.products import Products
from neq_kernels.conversion.convert import convert

BATCH = 2


def counted(model: nn.Module, *inputs: Tensor) -> Products:
    with Products(model, inputs) as count:
        loss = model(*inputs).sum()
        count.in_backward = True
        loss.backward()
    return count


class Of(nn.Module):
    """One weight, and what is computed with it."""

    def __init__(self, shape: tuple[int, ...], forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, self.weight)


CASES = {
    "linear": (nn.Linear(4, 5), (BATCH, 3, 4), BATCH * 3 * 4 * 5),
    "convolution": (nn.Conv2d(4, 6, 3, groups=2), (BATCH, 4, 5, 5), BATCH * 6 * 9 * 2 * 9),
    "transposed": (nn.ConvTranspose1d(4, 6, 3), (BATCH, 4, 5), BATCH * 4 * 5 * 6 * 3),
    "bilinear form": (Of((4, 4), lambda x, w: x @ w @ x.mT), (BATCH, 3, 4), BATCH * 3 * 4 * 4),
    "experts": (
        Of((3, 4, 5), lambda x, w: torch.einsum("bi,eio->beo", x, w)),
        (BATCH, 4),
        BATCH * 3 * 4 * 5,
    ),
    "one expert": (Of((3, 4, 5), lambda x, w: x @ w[1]), (BATCH, 4), BATCH * 4 * 5),
    "standardised": (
        Of((5, 4), lambda x, w: F.linear(x, (w - w.mean(1, True)) / w.std(1, keepdim=True))),
        (BATCH, 4),
        BATCH * 4 * 5,
    ),
    "masked": (
        Of((5, 4), lambda x, w: F.linear(x, torch.where(torch.ones(5, 1) > 0, w, w.detach()))),
        (BATCH, 4),
        BATCH * 4 * 5,
    ),
    "recurrent": (nn.GRUCell(4, 5), (BATCH, 4), BATCH * (4 * 15 + 5 * 15)),
    "attention": (Of((1,), lambda x, w: w * (x @ x.mT).softmax(-1) @ x), (BATCH, 3, 4), 0),
    "looked up": (Of((7, 4), lambda x, w: F.embedding(x.long(), w)), (BATCH,), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_products_with_a_parameter_are_counted(name: str) -> None:
    model, shape, macs = CASES[name]
    assert counted(model, torch.ones(shape)).macs == macs


def test_shares_are_of_products_and_of_their_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False))
    count = counted(model, torch.ones(1, 4))
    assert count.macs == 24 + 12
    assert count.share_of({"0.weight": 1.0, "1.weight": 1.0}) == 1
    assert count.share_of({"0.weight": 1.0}) == 24 / 36
    assert count.share_of({"1.weight": 0.5}) == 6 / 36
    both = Of((2, 4), lambda x, w: x @ torch.cat([w, model[0].weight]).mT)
    both.add_module("other", model[0])
    assert counted(both, torch.ones(1, 4)).share_of({"weight": 1.0}) == 0.5


def test_what_is_outside_is_added_up_over_blocks_that_are_alike() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 5, bias=False)
    )
    count = counted(model, torch.ones(1, 4))
    assert count.largest_outside({}) == ("*.weight", 1.0)
    assert count.largest_outside({"0.weight": 1.0, "2.weight": 1.0}) == ("*.weight", 20 / 61)
    assert count.largest_outside({f"{i}.weight": 1.0 for i in range(3)}) is None


def test_the_first_use_of_a_parameter_is_where_the_forward_reads_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first = counted(nn.Sequential(*reversed(model)), torch.ones(1, 4)).first_use
    assert max(first["0.weight"], first["0.bias"]) < min(first["1.weight"], first["1.bias"])


LAYERS = {
    "linear": (
        lambda: [nn.Linear(4, 6), nn.Linear(6, 2)],
        (BATCH, 4),
        (BATCH * 6 * 4, BATCH * 6 * 2),
    ),
    "convolutions": (
        lambda: [nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 2, 2)],
        (BATCH, 4, 3, 3),
        (BATCH * 9 * 6 * 4, BATCH * 9 * 6 * 2 * 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_input_gradients_are_counted_where_they_are_computed(name: str) -> None:
    make, shape, macs = LAYERS[name]
    x = torch.ones(shape, requires_grad=True)
    plain = nn.Sequential(*make())
    assert counted(plain, torch.ones(shape)).input_gradient_macs == macs[1]
    assert counted(plain, x).input_gradient_macs == sum(macs)
    plain[0].requires_grad_(False)
    assert counted(plain, torch.ones(shape)).input_gradient_macs == 0


@pytest.mark.parametrize("name", LAYERS)
def test_input_gradients_by_our_operators_are_counted(name: str) -> None:
    make, shape, macs = LAYERS[name]
    ours = convert(nn.Sequential(*make()))
    for layer in ours:
        layer.channels.set([0])
    x = torch.ones(shape, requires_grad=True)
    assert counted(ours, x).input_gradient_macs == sum(macs)
    assert counted(ours, torch.ones(shape)).input_gradient_macs == macs[1]
    ours[0].channels.set([])
    assert counted(ours, torch.ones(shape)).input_gradient_macs == 0


def test_computing_in_float32_inside_a_double_model_is_seen() -> None:
    model = Of((4, 4), lambda x, w: (x @ w).float().softmax(-1).double())
    assert counted(model.double(), torch.ones(1, 4).double()).computes_in_float32
    assert not counted(nn.Linear(4, 4).double(), torch.ones(1, 4).double()).computes_in_float32
