"""Committed results, in one folder for each class of CPU (:func:`machine.cpu_class`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neq_kernels.machine import CPU_CLASSES, cpu_class

# What PyTorch called the instructions in results of version 0.1, which do not say the class.
_OF_INSTRUCTIONS = {"AVX2": "x86-avx2"}


def class_of(machine: Mapping[str, Any]) -> str:
    """Of the machine that a record names; empty if it does not say."""
    return machine.get("cpu_class") or _OF_INSTRUCTIONS.get(machine.get("instructions", ""), "")


def folders(results: Path) -> dict[str, Path]:
    """The committed folders, by class."""
    return {name: results / name for name in CPU_CLASSES if (results / name).is_dir()}


def check(machine: Mapping[str, Any], expected: str, where: Path) -> None:
    """Raises ValueError if a record is not of the ``expected`` class."""
    if class_of(machine) != expected:
        found = class_of(machine) or "a machine of unknown class"
        raise ValueError(f"{where}: expected figures of {expected}, got {found}")


def own_folder(results: Path, machine: Mapping[str, Any], where: Path) -> Path:
    """Where a record of this machine's class is committed; made if it is missing.

    Args:
        results: the folders by class.
        machine: that the record names.
        where: the record.

    Raises:
        ValueError: the record is of a machine of another class.
    """
    check(machine, cpu_class(), where)
    folder = results / cpu_class()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
