"""PyTorch's own database of optimizers: every setting of each, half of every layer frozen."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, Adafactor, Muon, SparseAdam

from benchmarks.zoo.comparison import freeze_half
from neq_kernels.conversion.convert import convert
from neq_kernels.layers.traversal import neuron_owners
from neq_kernels.optim import attach
from tests.support.torch_databases import optim_db, optimizer_inputs

REFUSED = (LBFGS,)
# An active row's step depends on the frozen rows, too.
MIX_ROWS = (Adafactor, Muon)
ONLY_MATRICES = (Muon,)
ONLY_SPARSE = (SparseAdam,)
STEPS = 3

SETTINGS = [
    pytest.param(info.optim_cls, given.kwargs, id=f"{info.optim_cls.__name__}-{i}-{given.desc}")
    for info in optim_db
    for i, given in enumerate(
        # A differentiable step refuses parameters that are leaves, as a model's are.
        optimizer_inputs("cpu", torch.float64, info, skip=("differentiable",))
    )
]


def net(kind: type) -> nn.Sequential:
    bias = kind not in ONLY_MATRICES
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Linear(6, 4, bias=bias)).double()


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_frozen_rows_stay_and_active_ones_step_as_without_us(kind, options):
    dense, model = net(kind), convert(net(kind))
    frozen, owners = freeze_half(model), neuron_owners(model)
    optimizer = kind(model.parameters(), **copy.deepcopy(options))
    if kind in REFUSED:
        with pytest.raises(TypeError, match=f"optimizer: expected .*, got {kind.__name__}"):
            attach(optimizer, model)
        return
    plain = kind(dense.parameters(), **copy.deepcopy(options))
    before = copy.deepcopy(dense)
    attach(optimizer, model)
    for _ in range(STEPS):
        for theirs, ours in zip(dense.parameters(), model.parameters(), strict=True):
            gradient = torch.randn_like(ours)
            owners[ours][0][1].fill_(gradient, frozen[ours], 0.0)
            gradient = gradient.to_sparse() if kind in ONLY_SPARSE else gradient
            ours.grad, theirs.grad = gradient, gradient.clone()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*has no row per neuron")
            optimizer.step()
        plain.step()
    for old, theirs, ours in zip(
        before.parameters(), dense.parameters(), model.parameters(), strict=True
    ):
        layout, rows = owners[ours][0][1], frozen[ours]
        assert torch.equal(layout.gather(ours.detach(), rows), layout.gather(old.detach(), rows))
        active = owners[ours][0][0].active
        now = layout.gather(ours.detach(), active)
        assert not torch.equal(now, layout.gather(old.detach(), active))
        if kind not in MIX_ROWS:
            torch.testing.assert_close(
                now, layout.gather(theirs.detach(), active), rtol=1e-12, atol=1e-13
            )
