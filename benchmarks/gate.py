"""What of a compiled kernel fails, whichever language it is written in."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.ahead_of_time import Compiled
from benchmarks.occupancy import occupancy
from benchmarks.record import Row


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
