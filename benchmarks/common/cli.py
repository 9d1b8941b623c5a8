"""What every benchmark shows and takes on the command line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

from benchmarks.common import allocator

RED, PLAIN = "\x1b[31m", "\x1b[0m"
WRONG_RESULT, USER_ERROR, NO_GPU = 1, 2, 3


class Table:
    """Prints rows below a header as they come. ``columns``: (title, width), names to the left,
    numbers to the right; a negative width is to the left."""

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self._widths = [width for _, width in columns]
        self.line([title for title, _ in columns])

    def line(self, cells: Sequence[str], verdict: str = "") -> None:
        aligned = [
            f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
            for cell, width in zip(cells, self._widths, strict=True)
        ]
        print("  ".join([*aligned, verdict]).rstrip(), flush=True)


def verdict(passes: bool | None, target: str = "") -> str:
    """``ok``, ``short`` (red on a terminal), or nothing where there is no target."""
    if passes is None:
        return ""
    return f"ok {target}".rstrip() if passes else red(f"short {target}".rstrip())


def red(text: str) -> str:
    """Red on a terminal, plain in a file."""
    return f"{RED}{text}{PLAIN}" if sys.stdout.isatty() else text


def parser(
    module: ModuleSpec, description: str | None, epilog: str = ""
) -> argparse.ArgumentParser:
    """The parser of a module that is run by ``python -m``: of its ``__spec__`` and ``__doc__``."""
    return argparse.ArgumentParser(
        prog=f"python -m {module.name.removesuffix('.__main__')}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )


def user_error(error: object) -> int:
    """The exit code of a command that cannot do what was asked, after saying why."""
    print(f"error: {error}", file=sys.stderr)
    return USER_ERROR


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few small cases, in seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (%(default)s)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads")
    parser.add_argument(
        "--freed-memory",
        choices=allocator.FREED_MEMORY,
        default="kept",
        help="whether the process keeps it or the system gets it back (default: kept)",
    )


def prepare(given: argparse.Namespace, threads: int | None = None) -> None:
    """Make the process what the common arguments ask for; ``threads`` where they do not say."""
    if given.threads or threads:
        torch.set_num_threads(given.threads or threads)
    if given.freed_memory == "kept":
        allocator.keep_freed_memory()


def positive(text: str) -> int:
    """An argument type: a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """An argument type: a finite number above 0."""
    return _time(text, "seconds")


def minutes(text: str) -> float:
    """As :func:`seconds`."""
    return _time(text, "minutes")


def share(text: str) -> float:
    """An argument type: a number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text!r}")
    return value


def _time(text: str, unit: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected {unit} above 0, got {text!r}")
    return value


def _number(text: str) -> float:
    """NaN, which no comparison holds of, where ``text`` is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
