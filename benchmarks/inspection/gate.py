"""What of a compiled kernel fails, whichever language it is written in."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmarks.common.records import Row
from benchmarks.inspection.compile import Compiled


def judged(
    compiled: Compiled,
    target: str,
    plain: Compiled | None = None,
    least_share: float = 0.0,
    *,
    needs_tensor_core: bool = False,
) -> Row:
    """What the compiler made of a kernel, and what of it fails.

    Args:
        plain: of a product of matrices: a dense one of the same tile.
        least_share: of the dense product's share of tensor-core instructions in the main loop.
        needs_tensor_core: of a product that has no dense one beside it.
    """
    resident = occupancy(target, compiled.registers, compiled.shared, compiled.warps)
    row = asdict(compiled) | {"occupancy": resident}
    fails = []
    if compiled.spills:
        fails.append("spills")
    if not resident:
        fails.append("does not fit")
    if plain is not None or needs_tensor_core:
        row["share"] = compiled.tensor_core / max(1, compiled.loop)
        needs_tensor_core |= plain is not None and plain.tensor_core > 0
        if needs_tensor_core and not compiled.tensor_core:
            fails.append("no tensor core")
    if plain is not None:
        row["dense_share"] = plain.tensor_core / max(1, plain.loop)
        is_slow = row["share"] < least_share * row["dense_share"]
        if is_slow and "no tensor core" not in fails:
            fails.append("slow main loop")
    return row | {"fails": ", ".join(fails)}


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks that reside on it share.

    Attributes:
        partitions: parts with registers and warps of their own.
        warps: at most, per partition.
        registers: per partition and lane of a warp.
        register_unit: a warp gets a multiple of it, per lane.
        blocks: at most.
        shared: bytes of shared memory.
        shared_unit: a block gets a multiple of it.
        shared_reserved: bytes that the system takes of every block.
        shared_per_block: bytes that a block may have, without those.
    """

    partitions: int
    warps: int
    registers: int
    register_unit: int
    blocks: int
    shared: int
    shared_unit: int
    shared_reserved: int
    shared_per_block: int


# NVIDIA: CUDA C++ programming guide, "Technical Specifications per Compute Capability"; the units,
# the partitions and what is reserved: cuda_occupancy.h, which comes with CUDA (and with Triton).
# AMD: LLVM's AMDGPUBaseInfo.cpp (getVGPRAllocGranule, getTotalNumVGPRs, getMaxWavesPerEU,
# getEUsPerCU, getMaxWorkGroupsPerCU: its barriers never are what limits) and "AMD GPU
# specifications" in ROCm's documentation; units of shared memory: Mesa's aco_ir.cpp
# (lds_alloc_granule). A gfx942 is counted by compute units. A gfx1100 is counted by pairs of them
# (WGP mode): Triton compiles with ``.amdhsa_workgroup_processor_mode 1``.
# Not counted: scalar registers of gfx942, and tensor memory of sm_100.
_KIB = 1 << 10


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(4, 8, 512, 8, 16, 64 * _KIB, 256, 0, 64 * _KIB),
    "sm_80": Multiprocessor(4, 16, 512, 8, 32, 164 * _KIB, 128, _KIB, 163 * _KIB),
    "sm_90": Multiprocessor(4, 16, 512, 8, 32, 228 * _KIB, 128, _KIB, 227 * _KIB),
    "sm_100": Multiprocessor(4, 16, 512, 8, 32, 228 * _KIB, 128, _KIB, 227 * _KIB),
    "gfx942": Multiprocessor(4, 8, 512, 8, 32, 64 * _KIB, 512, 0, 64 * _KIB),
    "gfx1100": Multiprocessor(4, 16, 1536, 24, 64, 128 * _KIB, 1024, 0, 64 * _KIB),
}


def resident_warps(target: str, registers: int, shared: int, warps: int) -> int:
    """Warps of as many blocks as fit on a multiprocessor; 0 where not one does.

    Args:
        target: a key of ``MULTIPROCESSORS``.
        registers: per thread (gfx942: accumulation registers included).
        shared: bytes per block.
        warps: per block.
    """
    at = MULTIPROCESSORS[target]
    if shared > at.shared_per_block:
        return 0
    of_registers = at.registers // _up(max(1, registers), at.register_unit)
    blocks = min(at.blocks, at.partitions * min(at.warps, of_registers) // warps)
    taken = _up(shared + at.shared_reserved, at.shared_unit)
    if taken:
        blocks = min(blocks, at.shared // taken)
    return blocks * warps


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """``resident_warps`` as a share of the most warps that can reside."""
    at = MULTIPROCESSORS[target]
    return resident_warps(target, registers, shared, warps) / (at.partitions * at.warps)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
