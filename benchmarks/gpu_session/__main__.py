"""Everything for a machine with a GPU, in less than ten minutes: is it right, and is it faster?

>>> python -m benchmarks.gpu_session --out runs/gpu

1. correctness: the tests of the GPU kernels and ``neq doctor``'s self-check, on the card;
2. kernels: weight gradients alone, against PyTorch's kernels and a careful user's own code;
3. steps: whole training steps, beside the most that the masks can save;
4. energy: joules per step by the GPU's counter;
and a report of all that, ``report.md``. Each part is a process of its own with a share of the time;
what it leaves goes to the parts after it, and what finds no time is named. No speed-up is given for
a backend whose tests failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import cli, gpu_device, processes
from benchmarks.common.deadline import Deadline
from benchmarks.common.interrupt import Interrupted, Interruptible
from benchmarks.common.processes import Job
from benchmarks.common.records import Record, Row
from benchmarks.gpu_session import checks as gpu_session_checks
from benchmarks.gpu_session import report

NAME = "gpu"
CORRECTNESS = "correctness"
MEASUREMENTS = {
    "kernels": "benchmarks.kernels.gpu",
    "steps": "benchmarks.steps.gpu",
    "energy": "benchmarks.steps.gpu_energy",
}
# Shares of the time.
PHASES = {CORRECTNESS: 0.3, "kernels": 0.3, "steps": 0.3, "energy": 0.1}
MINUTES = 9.0
# Seconds that a part may take longer than it was told to, for the cell it is in.
OVERRUN = 20.0
LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class SessionOptions:
    """What is measured, and where it is written."""

    out: Path
    phases: tuple[str, ...] = tuple(PHASES)
    minutes: float = MINUTES


def run(options: SessionOptions, record: Record, check: Callable[[], None] = lambda: None) -> int:
    """All phases, one after the other; the exit code. What they found is in ``record``, and in
    records of their own beside it."""
    whole = Deadline.after(60 * options.minutes)
    left = {name: PHASES[name] for name in options.phases}
    failed: list[str] = []
    code = 0
    for name in options.phases:
        check()
        deadline = whole.part(name, left)
        del left[name]
        if deadline.left < LEAST_SECONDS:
            record.add({"phase": name, "status": "left out: no time left"})
            continue
        print(f"\n== {name}, {deadline.left:.0f} s", flush=True)
        if name == CORRECTNESS:
            checks = gpu_session_checks.run(gpu_device.own_backends(), deadline, check)
            for each in checks:
                record.add({"phase": name, **each.row()})
                _show(each)
            failed = gpu_session_checks.failed_backends(checks)
            code = code or (cli.WRONG_RESULT if failed else 0)
        else:
            row = _measured(name, options.out, deadline, failed, check)
            record.add(row)
            code = code or (cli.WRONG_RESULT if row["exit_code"] != 0 else 0)
    return code


def _measured(
    name: str,
    out: Path,
    deadline: Deadline,
    failed: Sequence[str],
    check: Callable[[], None],
) -> Row:
    report.record_of(name, out).unlink(missing_ok=True)  # of an earlier run
    arguments = ["--out", str(out), "--seconds", f"{deadline.left:.0f}"]
    arguments += ["--failed", *failed] if failed else []
    job = Job(MEASUREMENTS[name], arguments, shown=True)
    latest = Deadline(deadline.at + OVERRUN, deadline.now)
    ended = processes.run({name: job}, latest, check)[name]
    if ended.code is None:
        status = f"ended after {ended.seconds:.0f} s: it did not come to an end by itself"
    elif ended.code < 0:
        status = f"the process died (signal {-ended.code})"
    else:
        known = {0: "measured", cli.WRONG_RESULT: "not everything was right"}
        status = known.get(ended.code, f"failed (exit code {ended.code})")
    row = {"phase": name, "status": status, "exit_code": ended.code, "seconds": ended.seconds}
    print(f"{name}: {status}", flush=True)
    return row


def _show(check: gpu_session_checks.Check) -> None:
    failed = check.status == gpu_session_checks.FAILED
    status = cli.red("FAILED") if failed else check.status
    print(f"{check.name}: {status}", flush=True)
    if check.status != gpu_session_checks.PASSED:
        print("\n".join(f"    {line}" for line in check.detail), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(
        __spec__,
        __doc__,
        epilog=f"exit codes: 0, {cli.WRONG_RESULT} if something was wrong, "
        f"{cli.USER_ERROR} for a mistake in the arguments, {cli.NO_GPU} without a GPU",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (%(default)s)")
    parser.add_argument("--minutes", type=cli.minutes, default=MINUTES, help="in all (%(default)g)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES, help="default: all")
    given = parser.parse_args(arguments)
    if not gpu_device.found():
        return gpu_device.nothing_measured()
    phases = tuple(name for name in PHASES if name in given.phases)
    missing = gpu_session_checks.missing_packages() if CORRECTNESS in phases else []
    if missing:
        needed = ", ".join(missing)
        return cli.user_error(f"the tests need {needed}: pip install -e '.[test,bench,energy]'")
    options = SessionOptions(given.out, phases, given.minutes)
    settings: dict[str, Any] = {"phases": phases, "minutes": given.minutes}
    try:
        with Record(given.out, NAME, settings | {"gpu": gpu_device.facts()}) as record:
            code = _interruptible(options, record)
        print(f"\n{report.write(given.out)}")
    except OSError as error:
        return cli.user_error(error)
    return code


def _interruptible(options: SessionOptions, record: Record) -> int:
    try:
        with Interruptible() as stop:
            return run(options, record, stop.check)
    except Interrupted as interrupted:
        record.add({"phase": "all", "status": f"interrupted by {interrupted}"})
        return interrupted.exit_code


if __name__ == "__main__":
    sys.exit(main())
