"""What the sanitizer has to be told about row steps and optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from ttsem import harness
from ttsem.memory import Memory

from neq_kernels.backends.triton import multi_tensor
from neq_kernels.controllers.probe.probe import Probe
from tests.support.backends import triton


@contextmanager
def prepared_sanitizer() -> Iterator[None]:
    """Within it the sanitizer knows the tensors that row steps find by addresses in a table, beside
    those that a launch is given: what lies outside of them, and races on them, are errors."""
    launch, tensors = multi_tensor.launch, []

    class WithTheirMemory(Memory):
        def __init__(self) -> None:
            super().__init__()
            for base, data in {t.untyped_storage().data_ptr(): _bytes(t) for t in tensors}.items():
                if len(data):
                    self.register(base, data)

    def launch_with(kernel, lists, *args, **kwargs):
        tensors[:] = [t for some in lists for t in some]
        try:
            launch(kernel, lists, *args, **kwargs)
        finally:
            tensors.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_tensor, "launch", launch_with)
        patch.setattr(harness, "Memory", WithTheirMemory)
        # Inside of an operator its tensors say that they are on the CPU.
        patch.setattr(triton, "supports", lambda device_type: True)
        # These ask the GPU that the sanitizer pretends to have.
        patch.setattr(Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
        patch.setattr(Probe, "_generators", lambda self: [torch.default_generator])
        yield


def _bytes(tensor: Tensor):
    """The whole storage, not a copy: what the kernel writes stays."""
    flat = torch.empty(0, dtype=torch.uint8)
    return flat.set_(tensor.untyped_storage()).numpy()
