"""The backend itself, on CPU tensors: its library with the emulator in the place of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

from neq_kernels import dispatch
from neq_kernels.backends import cuda
from tests import oracle
from tests.backends.cuda.cases import FOLDER
from tests.cuda_on_cpu.emulator import build


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


@pytest.fixture(scope="session")
def emulated_library() -> str:
    sources = [*sorted(FOLDER.glob("*.cu")), FOLDER / "ops.cpp"]
    library = build(
        sources,
        checked=False,
        defines={"NEQ_CUDA_ON_CPU": 1, "TORCH_TARGET_VERSION": "0x020a000000000000"},
        flags=[f"-isystem{path}" for path in include_paths()],
        links=[*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"],
    )
    return str(library.path)


@pytest.fixture
def ops(emulated_library, monkeypatch) -> Iterator[CountedOps]:
    """CPU tensors are served by the CUDA kernels."""
    monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, emulated_library)
    counted = CountedOps(cuda._leaf)
    monkeypatch.setattr(cuda, "_leaf", counted)
    cuda.unavailable.cache_clear()
    dispatch.forget_choices()
    with oracle.forced_backend("cuda"):
        yield counted
    cuda.unavailable.cache_clear()
    dispatch.forget_choices()
