"""The backend itself. CPU tensors go to its library with the emulator in the place of a GPU; where
``NEQ_CUDA_EXECUTOR=cuda`` says so (``benchmarks/gpu_session/checks.py``), a GPU's to the real."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from neq_kernels.backends import cuda
from neq_kernels.backends.cuda import Cuda
from neq_kernels.dispatch.selection import selector
from tests.cuda_on_cpu.emulator import build
from tests.support.cuda_cases import DEVICE, FOLDER


class CountedOps:
    """The leaf ops, and how often each was called."""

    def __init__(self, ops) -> None:
        self._ops, self.calls = ops, Counter()

    def __getattr__(self, name: str):
        op = getattr(self._ops, name)

        def counted(*arguments):
            self.calls[name] += 1
            return op(*arguments)

        return counted


@contextmanager
def full_precision() -> Iterator[None]:
    """By default PyTorch allows TF32 in convolutions."""
    setting = torch.backends.cudnn.conv
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    yield
    setting.fp32_precision = before


def build_emulated(replace: Sequence[tuple[str, str, str]] = ()) -> str:
    """The backend's library with the emulator in it."""
    library = build(
        sorted([*FOLDER.rglob("*.cu"), *FOLDER.rglob("*.cpp")]),
        checked=False,
        defines={"NEQ_CUDA_ON_CPU": 1, "TORCH_TARGET_VERSION": "0x020a000000000000"},
        replace=replace,
        flags=[f"-isystem{path}" for path in include_paths()],
        links=[*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"],
    )
    return str(library.path)


@pytest.fixture(scope="session")
def emulated_library() -> str | None:
    """None where a GPU is there to run the library."""
    return None if DEVICE == "cuda" else build_emulated()


class EmulatedCuda(Cuda):
    """CPU tensors, and the emulator in the place of a GPU."""

    device_type = "cpu"

    def __init__(self, library: str) -> None:
        self._library = library

    def unavailable(self) -> str | None:
        return cuda.load_library(self._library)


@contextmanager
def emulated(library: str | None) -> Iterator[None]:
    """Tensors of ``DEVICE`` are given to the CUDA kernels; None: to those of the real library."""
    with pytest.MonkeyPatch.context() as patch, full_precision():
        if library is not None:
            patch.setitem(selector.backends, "cuda", EmulatedCuda(library))
        selector.forget()
        with selector.forced_backend("cuda"):
            yield
    selector.forget()


@pytest.fixture
def ops(emulated_library, monkeypatch) -> Iterator[CountedOps]:
    """Tensors of ``DEVICE`` are given to the CUDA kernels, whose calls are counted."""
    counted = CountedOps(cuda._leaf)
    monkeypatch.setattr(cuda, "_leaf", counted)
    with emulated(emulated_library):
        yield counted
