"""The row steps compiled for GPUs that are not there."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl
from triton.compiler import ASTSource

from benchmarks.ahead_of_time import TARGETS
from neq_kernels.backends.triton.row_steps import adam_kernel, sgd_kernel

TILES = {"STRETCH": 1024, "ACROSS": 512}
# With as many tensors as there can be, and as few.
KERNELS = {
    "adam": (adam_kernel, {"AMSGRAD": True}, 5),
    "sgd": (sgd_kernel, {"MOMENTUM": True, "COUNTED": True, "NESTEROV": True}, 3),
    "plain sgd": (sgd_kernel, {"MOMENTUM": False, "COUNTED": False, "NESTEROV": False}, 2),
}


def compiled(kernel, target, constants):
    types = {"addresses": "*i64", "shapes": "*i64", "parameters": "i32"}
    signature = {
        p.name: "constexpr" if p.is_constexpr else types.get(p.name, "fp32") for p in kernel.params
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target)


@pytest.mark.parametrize("dtype", [tl.float32, tl.float16, tl.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_long_neurons_are_read_in_vectors_and_no_tile_changes_its_layout(target, name, dtype):
    kernel, flags, tensors = KERNELS[name]
    made = compiled(kernel, TARGETS[target], {"ELEMENT": dtype, **flags, **TILES})
    assert "convert_layout" not in made.asm["ttgir"]
    assert made.metadata.shared == 0
    if target.startswith("sm"):
        vectors = re.findall(r"ld\.global\.v4\.b32", made.asm["ptx"])
        assert len(vectors) == tensors * (2 if dtype == tl.float32 else 1)
    else:
        assert "vgpr_spill_count: 0" in made.asm["amdgcn"]
        loads = re.findall(r"global_load_(?:dwordx[24]|b64|b128) ", made.asm["amdgcn"])
        assert len(loads) >= tensors
