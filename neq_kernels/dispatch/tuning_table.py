"""The table of choices that were measured to be fastest, in memory and on disk.

:func:`neq_kernels.tune` measures the layers of a model; what else is measured
``NEQ_KERNELS_TUNE`` says: where the cost model is in doubt (``doubt``, the default), every layer
when it is met first (``always``), nothing (``never``). Winners are kept in
``NEQ_KERNELS_TUNING_DIR`` (by default ``neq_kernels`` in the user's cache folder), one file for
each GPU, or CPU, instruction set and number of threads, and version of PyTorch and of this package.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from neq_kernels.backends.problem import KernelChoice, Problem, Strategy

logger = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "NEQ_KERNELS_TUNING_DIR"
MEASURE_VARIABLE = "NEQ_KERNELS_TUNE"
TuningMode = Literal["never", "doubt", "always"]
_MODES: dict[str, TuningMode] = {
    "": "doubt",
    "doubt": "doubt",
    "never": "never",
    "always": "always",
    "0": "never",
    "1": "always",
}
_FORMAT = 1
_BUCKETS_PER_DOUBLING = 4
_COUNT = " active<="
# As version 0.1.0 called them.
_OLD_NAMES = {"FUSED": "CUSTOM"}


def count_bucket(n: int, k: int) -> int:
    """The most active channels that share a table entry with ``n`` of ``k``: four entries for each
    doubling, and one for all channels active."""
    if n in (0, k):
        return n
    step = math.ceil(_BUCKETS_PER_DOUBLING * math.log2(n) - 1e-9)
    return min(k - 1, math.floor(2 ** (step / _BUCKETS_PER_DOUBLING) + 1e-9))


def key(problem: Problem, n: int) -> str:
    """How a table names a problem with ``n`` active channels."""
    return f"{_name(problem)}{_COUNT}{count_bucket(n, problem.neurons)}"


def _name(problem: Problem) -> str:
    g = problem.geometry
    parts: list[Any] = [problem.input_size, problem.weight_size]
    if g is not None:
        parts += [g.stride, g.padding, g.dilation, g.output_padding, (g.groups,)]
    words = ["x".join(map(str, part)) for part in parts]
    kind = "linear" if g is None else ("transposed" if g.transposed else "conv")
    layout = "channels_last" if problem.channels_last else "contiguous"
    dtype = str(problem.dtype).removeprefix("torch.")
    return " ".join([kind, *words, layout, dtype])


class TuningTable:
    """Winners by :func:`key`.

    Args:
        folder: where files are kept; None keeps everything in memory.
        measured_with: what the winners hold for; a file that says otherwise is not used.
        reads: whether winners of earlier processes are used.
    """

    def __init__(
        self, folder: Path | None, measured_with: Mapping[str, Any], reads: bool = True
    ) -> None:
        self._measured_with = dict(measured_with)
        self._path = None if folder is None else folder / file_name("tuning", self._measured_with)
        self._winners: dict[str, KernelChoice] = {}
        # By problem, the numbers of active channels that were measured.
        self._counts: dict[str, list[int]] = {}
        if self._path is not None and reads:
            self._use(self._read(self._path))

    def __len__(self) -> int:
        return len(self._winners)

    def get(self, problem: Problem, n: int) -> KernelChoice | None:
        """The winner for ``n`` active channels, or None when that was not measured."""
        return self._winners.get(key(problem, n)) if self._winners else None

    def others(self, problem: Problem, n: int) -> dict[int, KernelChoice]:
        """The winners for other numbers of channels of the same problem, the nearest first; for all
        channels active none, nor theirs."""
        k = problem.neurons
        if n in (0, k) or not self._counts:
            return {}
        name = _name(problem)
        counts = [count for count in self._counts.get(name, ()) if 0 < count < k]
        counts.sort(key=lambda count: abs(math.log(count / n)))
        return {count: self._winners[f"{name}{_COUNT}{count}"] for count in counts}

    def put(self, problem: Problem, n: int, winner: KernelChoice) -> None:
        """Keep a winner, in memory; :meth:`save` writes the file."""
        self._add(key(problem, n), winner)

    def _use(self, winners: Mapping[str, KernelChoice]) -> None:
        self._winners, self._counts = {}, {}
        for each, winner in winners.items():
            self._add(each, winner)

    def _add(self, name: str, winner: KernelChoice) -> None:
        about, _, count = name.rpartition(_COUNT)
        if name not in self._winners and count.isdecimal():
            self._counts.setdefault(about, []).append(int(count))
        self._winners[name] = winner

    def save(self) -> Path | None:
        """Write the file, whole or not at all, with what other processes wrote there since; returns
        its path, None where there is none or it cannot be written (a warning says why)."""
        if self._path is None:
            return None
        winners = {**self._read(self._path, warns=False), **self._winners}
        text = json.dumps(
            {"format": _FORMAT, "measured_with": self._measured_with, **_state(winners)}, indent=1
        )
        return self._path if write_whole(self._path, text) else None

    def state_dict(self) -> dict[str, Any]:
        """The winners, for a checkpoint: JSON types only."""
        return _state(self._winners)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Use exactly the winners of a checkpoint, so that a resumed run makes the same bits.

        Raises:
            ValueError: ``state`` is not what :meth:`state_dict` returned.
        """
        self._use(parsed(state))

    def _read(self, path: Path, warns: bool = True) -> dict[str, KernelChoice]:
        try:
            saved = json.loads(path.read_text())
            if saved["format"] != _FORMAT or saved["measured_with"] != self._measured_with:
                raise ValueError("it was measured with something else")
            return parsed(saved)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if warns:
                logger.warning("the tuning table %s is ignored: %s", path, error)
            return {}


def write_whole(path: Path, text: str) -> bool:
    """Write a file, whole or not at all; False where that is not possible (a warning says why)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("%s is not saved: %s", path.name, error)
        return False
    return True


def _state(winners: Mapping[str, KernelChoice]) -> dict[str, Any]:
    return {"winners": {name: _written(choice) for name, choice in sorted(winners.items())}}


def _written(choice: KernelChoice) -> str:
    name = ":".join(filter(None, [choice.backend, choice.strategy.name]))
    return " ".join([name, *(str(int(setting)) for setting in choice.settings)])


def _read(text: str) -> KernelChoice:
    name, *settings = text.split()
    backend, _, strategy = name.rpartition(":")
    strategy = _OLD_NAMES.get(strategy, strategy)
    return KernelChoice(Strategy[strategy], tuple(map(int, settings)), backend)


def parsed(state: Mapping[str, Any]) -> dict[str, KernelChoice]:
    """The winners of a state.

    Raises:
        ValueError: it is not what ``TuningTable.state_dict`` returned.
    """
    try:
        return {str(name): _read(winner) for name, winner in state["winners"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"tuning: expected winners as state_dict() returns them ({error!r})"
        ) from error


def directory() -> Path:
    """Where tables are kept."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neq_kernels"


def tuning_mode() -> TuningMode:
    """What is measured while a model trains.

    Raises:
        ValueError: ``NEQ_KERNELS_TUNE`` says something else.
    """
    asked = os.environ.get(MEASURE_VARIABLE, "")
    if asked not in _MODES:
        raise ValueError(f"{MEASURE_VARIABLE}: expected never, doubt or always, got {asked!r}")
    return _MODES[asked]


def file_name(kind: str, about: Mapping[str, Any]) -> str:
    """Of a file of this kind that holds for what ``about`` says."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"{kind}-{digest[:16]}.json"
