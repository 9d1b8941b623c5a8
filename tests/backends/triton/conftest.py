"""What executes the kernels, an emulator or a GPU, has to be named, as
``tests/backends/test_triton.py`` and ``benchmarks/gpu_session/checks.py`` do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from neq_kernels.backends.triton.backend import Triton
from neq_kernels.dispatch.selection import selector
from tests.support.gpu_cases import EXECUTOR


class InterpretedTriton(Triton):
    """CPU tensors, given to Triton's interpreter (``TRITON_INTERPRET=1``)."""

    device_type = "cpu"

    def supports(self, device_type: str) -> bool:
        return device_type in ("cpu", "cuda")

    def unavailable(self) -> str | None:
        return None


if EXECUTOR == "interpreter":
    selector.backends["triton"] = InterpretedTriton()
    selector.forget()

collect_ignore_glob = [] if EXECUTOR else ["test_*.py"]


@pytest.fixture
def device() -> str:
    """The interpreter works on CPU tensors; the sanitizer takes CPU tensors for CUDA ones."""
    return "cpu" if EXECUTOR == "interpreter" else "cuda"


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """By default PyTorch allows TF32 in convolutions; an environment may allow it in products."""
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value


@pytest.fixture(autouse=True)
def _prepared_sanitizer() -> Iterator[None]:
    if EXECUTOR == "sanitizer":
        from tests.support.triton_sanitizer import prepared_sanitizer

        with prepared_sanitizer():
            yield
    else:
        yield
