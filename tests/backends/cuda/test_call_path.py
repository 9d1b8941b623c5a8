"""How many functions a call takes to a CUDA kernel."""

from __future__ import annotations

import pytest

from neq_kernels.backends import cuda as module
from tests.support.call_path import path_of_a_linear_layer
from tests.support.cuda_cases import DEVICE


@pytest.mark.parametrize("autocast", [False, True])
def test_eight_functions_to_a_kernel(autocast, ops, monkeypatch):
    path = path_of_a_linear_layer(module, monkeypatch, DEVICE, autocast)
    assert len(path) == 8, path
    assert path[-2:] == ["linear_backward", "linear_wgrad"]
