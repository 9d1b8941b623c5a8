"""The row steps compiled for GPUs that are not there."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.inspection import gpu_kernels
from benchmarks.inspection.compile import TARGETS, build, compile_for, recorded

# With as many tensors as there can be, and as few.
TENSORS = {"adam amsgrad": 5, "sgd counted nesterov": 3, "sgd": 2}


@pytest.mark.parametrize("dtype", gpu_kernels.DTYPES, ids=str)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("target", TARGETS)
def test_long_neurons_are_read_in_vectors_and_no_tile_changes_its_layout(target, name, dtype):
    case = next(c for c in gpu_kernels.cases() if (c.name, c.dtype) == (name, dtype))
    with recorded() as launches:
        case.call()
    (launch,) = launches
    made, compiled = build(launch, TARGETS[target]), compile_for(launch, TARGETS[target])
    assert "convert_layout" not in made.asm["ttgir"]
    assert compiled.shared == 0
    assert compiled.spills == 0
    if target.startswith("sm"):
        vectors = re.findall(r"ld\.global\.v4\.b32", made.asm["ptx"])
        assert len(vectors) == TENSORS[name] * (2 if dtype == torch.float32 else 1)
    else:
        loads = re.findall(r"global_load_(?:dwordx[24]|b64|b128) ", made.asm["amdgcn"])
        assert len(loads) >= TENSORS[name]
