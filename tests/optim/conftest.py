"""Fixtures of the whole-step check's tests."""

from __future__ import annotations

import pytest

from neq_kernels.optim import step_check
from tests.support.checked_steps import asked_for, recorded_strategies


@pytest.fixture
def step_check_asked_for(monkeypatch, stock_algorithms):
    with asked_for(monkeypatch):
        yield


@pytest.fixture
def hasty(monkeypatch):
    """As many dense steps as the check likes."""
    monkeypatch.setattr(step_check, "MOST_DENSE_SHARE", 1.0)


@pytest.fixture
def strategies(monkeypatch):
    return recorded_strategies(monkeypatch)
