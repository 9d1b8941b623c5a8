"""What every test gets: fixed seeds, poisoned allocations, and the choice of backend."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from neq_kernels.dispatch import calibration, tuning_table
from neq_kernels.dispatch.selection import selector
from tests.support.oracle import forced_backend, usable_backends

settings.register_profile(
    "neq",
    database=None,
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("neq")


@pytest.fixture(autouse=True, scope="session")
def _no_tuning_tables_of_the_user(tmp_path_factory):
    os.environ[tuning_table.DIRECTORY_VARIABLE] = str(tmp_path_factory.mktemp("tuning"))
    # The same kernels, the same bits in every run.
    os.environ[tuning_table.MEASURE_VARIABLE] = "never"


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """What is allocated and never written is NaN (integers: the largest), in C++ too."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Tuning tables of this test alone, which are read, and measurements that nobody deterministic
    minds; nothing is calibrated."""
    monkeypatch.setenv(tuning_table.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setenv(tuning_table.MEASURE_VARIABLE, "doubt")
    monkeypatch.setenv(calibration.SWITCH, "0")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    selector.forget()
    yield tmp_path
    torch.use_deterministic_algorithms(before, warn_only=True)
    selector.forget()


@pytest.fixture
def stock_algorithms(_poisoned_allocations):
    """The algorithms a user gets who asks for nothing; allocations are not poisoned."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=usable_backends())
def backend(request):
    """The test runs once on every backend this machine has for CPU tensors."""
    with forced_backend(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With ``NEQ_NO_SKIPS=1``, as in CI, what is skipped fails: it would prove nothing there."""
    report = yield
    if report.skipped and os.environ.get("NEQ_NO_SKIPS") == "1":
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped: {report.longrepr}"
    return report
