"""The kernels need a GPU, or one of the executors that ``tests/backends/test_triton.py`` starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.backends.triton.cases import EXECUTOR

collect_ignore_glob = [] if EXECUTOR or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def device() -> str:
    """The interpreter works on CPU tensors; the sanitizer takes CPU tensors for CUDA ones."""
    return "cpu" if EXECUTOR == "interpreter" else "cuda"


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """By default PyTorch allows TF32 in convolutions."""
    setting = torch.backends.cudnn.conv
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    yield
    setting.fp32_precision = before
