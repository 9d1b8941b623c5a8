"""How many functions a call takes to the C++ extension."""

from __future__ import annotations

import pytest

from neq_kernels.backends import cpu as module
from tests.support.backends import cpu
from tests.support.call_path import path_of_a_linear_layer


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the way to the extension")
def test_seven_functions_to_the_extension(monkeypatch):
    path = path_of_a_linear_layer(module, monkeypatch, "cpu")
    assert path == [
        *("forward", "linear", "run", "forward", "linear_forward"),
        *("backward", "call"),
    ]
