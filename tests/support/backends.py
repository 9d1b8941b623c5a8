"""The backends that the selector uses, by name."""

from __future__ import annotations

from neq_kernels.dispatch.selection import selector

aten, cpu, cuda, reference, triton = (
    selector.backends[name] for name in ("aten", "cpu", "cuda", "reference", "triton")
)
