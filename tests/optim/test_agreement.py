"""Masks that differ between ranks are found; ranks are threads that share a store."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

import neq_kernels as neq
from neq_kernels.optim import agreement
from neq_kernels.optim.agreement import INTERVAL, Agreement


class Rank:
    """One process's model and its side of the agreement."""

    def __init__(self, number, rank, make=lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))):
        self.rank, self.model = rank, neq.convert(make())
        self.agreement = Agreement()
        self.agreement._number = number

    def train(self, monkeypatch, n_steps=INTERVAL):
        monkeypatch.setattr(dist, "get_rank", lambda: self.rank)
        for _ in range(n_steps):
            self.agreement.count(self.model.named_children())


@pytest.fixture(name="store")
def store_fixture(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(agreement, "in_process_group", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    return store


def test_all_ranks_raise_one_interval_later(store, monkeypatch):
    ranks = [Rank(0, rank) for rank in range(3)]
    for rank in ranks:
        rank.train(monkeypatch)
    ranks[1].model[1].channels.set([0])
    for rank in ranks:
        rank.train(monkeypatch)
    for rank in ranks:
        rank.train(monkeypatch, INTERVAL - 1)
        message = r"2 different sets at step 200 of the optimizer \(ranks 0, 2; rank 1\)"
        with pytest.raises(RuntimeError, match=message):
            rank.train(monkeypatch, 1)


def test_equal_masks_agree_for_good_and_the_store_does_not_grow(store, monkeypatch):
    ranks = [Rank(0, rank) for rank in range(3)]
    for n in range(6):
        for rank in ranks:
            rank.model[0].channels.set([n % 3])
            rank.train(monkeypatch)
    assert store.num_keys() <= 3 * 3


def test_ranks_that_are_behind_or_have_other_layers_are_left_out(store, monkeypatch):
    ranks = [Rank(0, 0), Rank(0, 1, lambda: nn.Sequential(nn.Linear(2, 3))), Rank(0, 2)]
    ranks[1].model[0].channels.set([0])
    ranks[2].model[0].channels.set([1])
    for _ in range(4):
        ranks[0].train(monkeypatch)
    ranks[1].train(monkeypatch, 4 * INTERVAL)
    with pytest.raises(RuntimeError, match=r"\(rank 0; rank 2\)"):
        ranks[2].train(monkeypatch, 4 * INTERVAL)


def test_each_optimizer_has_its_own_keys(store, monkeypatch):
    first, second = Rank(0, 0), Rank(1, 1)
    second.model[0].channels.set([0])
    for rank in (first, second, first, second):
        rank.train(monkeypatch)


@pytest.mark.usefixtures("store")
def test_an_attached_optimizer_counts_its_steps(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    model = neq.convert(nn.Sequential(nn.Linear(2, 3)))
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = neq.attach(optimizer, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(INTERVAL):
        optimizer.step()
    other = Rank(handle._agreement._number, 1)
    other.model = neq.convert(nn.Sequential(nn.Linear(2, 3)))
    other.model[0].channels.set([0])
    other.train(monkeypatch)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    for _ in range(INTERVAL - 1):
        optimizer.step()
    with pytest.raises(RuntimeError, match="rank 0; rank 1"):
        optimizer.step()
