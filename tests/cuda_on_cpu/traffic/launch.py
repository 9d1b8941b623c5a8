"""What a launch moved, as a checked build counts it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.cuda_on_cpu.build import Library

SECTOR_BYTES = 32


@dataclass(frozen=True)
class Requests:
    """Requests of warps to global memory: the ``turn``-th execution of one instruction by the lanes
    of a warp, between two points where all its lanes meet, is one request. ``sectors`` are the
    distinct 32-byte sectors of every request, added up; ``bytes`` are what the lanes asked for."""

    requests: int = 0
    sectors: int = 0
    bytes: int = 0

    def __add__(self, other: Requests) -> Requests:
        return Requests(
            self.requests + other.requests,
            self.sectors + other.sectors,
            self.bytes + other.bytes,
        )

    @property
    def moved_bytes(self) -> int:
        return self.sectors * SECTOR_BYTES


@dataclass(frozen=True)
class Traffic:
    """Requests, and the distinct bytes and sectors that were touched: what a launch with an
    unlimited cache would have to move. Atomic operations touch as a read and a write."""

    loads: Requests = Requests()
    stores: Requests = Requests()
    atomics: Requests = Requests()
    read_bytes: int = 0
    written_bytes: int = 0
    read_sectors: int = 0
    written_sectors: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            *(getattr(self, name) + getattr(other, name) for name in Traffic.__match_args__)
        )

    @property
    def moved_bytes(self) -> int:
        """Of loads, stores and atomic operations, in whole sectors."""
        return (self.loads + self.stores + self.atomics).moved_bytes

    @property
    def least_bytes(self) -> int:
        """Every sector that is read or written, once each."""
        return (self.read_sectors + self.written_sectors) * SECTOR_BYTES


@dataclass(frozen=True)
class Line:
    """The requests of one kind that one line of a source makes to one tensor."""

    file: str
    line: int
    region: str
    access: str
    counts: Requests


class Launch:
    """A kernel that has run, and what it moved. The latter only in a checked build.

    Raises:
        ValueError: what it moved is asked for, and the build is a fast one.
    """

    def __init__(self, library: Library, launch: dict[str, Any]) -> None:
        self._library, self._launch = library, launch
        self.grid: tuple[int, ...] = tuple(launch.get("grid", ()))
        self.block: tuple[int, ...] = tuple(launch.get("block", ()))
        self.shared_bytes: int = launch.get("shared_bytes", 0)

    @classmethod
    def from_json(cls, library: Library, launch: dict[str, Any]) -> Launch:
        return cls(library, launch)

    @cached_property
    def kernel(self) -> str:
        """The kernel's name with its template arguments; or the host function that wrote memory."""
        if "name" in self._launch:
            return str(self._launch["name"])
        return self._library.function_name(self._launch["kernel"])

    @property
    def _traffic(self) -> dict[str, Any]:
        if "traffic" not in self._launch:
            raise ValueError("a fast build counts nothing: expected a checked one")
        traffic: dict[str, Any] = self._launch["traffic"]
        return traffic

    @property
    def shared_bytes_read(self) -> int:
        """Of shared memory, by loads of lanes and once for each row of ``ldmatrix``."""
        return int(self._traffic["shared_read"])

    @property
    def shared_bytes_written(self) -> int:
        return int(self._traffic["shared_written"])

    @cached_property
    def regions(self) -> dict[str, Traffic]:
        """By the tensor's name, all tensors of the run."""
        counts: dict[str, dict[str, Requests]] = {}
        for line in self._traffic["lines"]:
            of = counts.setdefault(line["region"], {})
            access = line["access"]
            of[access] = of.get(access, Requests()) + _requests(line)
        return {
            name: Traffic(
                **counts.get(name, {}),
                read_bytes=touched[0],
                written_bytes=touched[1],
                read_sectors=touched[2],
                written_sectors=touched[3],
            )
            for name, touched in self._traffic["touched"].items()
        }

    @property
    def total(self) -> Traffic:
        """Of all tensors together."""
        return sum(self.regions.values(), Traffic())

    @cached_property
    def lines(self) -> list[Line]:
        """The same by source line, the most sectors first."""
        found = self._library.locate([line["pc"] for line in self._traffic["lines"]])
        counts: dict[tuple[Any, ...], Requests] = {}
        for place, line in zip(found, self._traffic["lines"], strict=True):
            key = (*place, line["region"], line["access"])
            counts[key] = counts.get(key, Requests()) + _requests(line)
        lines = [Line(*key, requests) for key, requests in counts.items()]
        return sorted(lines, key=lambda line: -line.counts.sectors)


def _requests(line: dict[str, Any]) -> Requests:
    return Requests(line["requests"], line["sectors"], line["bytes"])
