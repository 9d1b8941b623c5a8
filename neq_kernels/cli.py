"""The ``neq`` command: what this machine runs, and what a model costs."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import neq_kernels
from neq_kernels.backends import cuda
from neq_kernels.backends.problem import Strategy
from neq_kernels.dispatch.selection import selector
from neq_kernels.doctor import checks as doctor_checks
from neq_kernels.doctor import runner
from neq_kernels.integrations.named_models import named_model
from neq_kernels.machine import machine
from neq_kernels.measure import EnergyMeter, flops
from neq_kernels.measure.energy import NO_COUNTER
from neq_kernels.measure.layer_times import LayerTime, layer_times

FAILED_CHECK = 1
USER_ERROR = 2
DEFAULT_SIZE = (224, 224)
SHOWN_FAILURES = 3
LAYER_HEADER = ("layer", "kind", "MACs", "share", "dgrad MACs", "wgrad MACs")
BENCH_HEADER = ("layer", "active", *(s.name.lower() for s in Strategy), "chosen", "over dense")
BENCH_WIDTHS = (34, 11, 9, 9, 9, 8, 0)
CHECK_WIDTHS = (20, 14, 9, 0)
BUILD_CUDA = """
  The CUDA kernels were not built. This builds them, in the source tree of neq_kernels:
    pip install 'setuptools>=77' wheel ninja
    NEQ_BUILD_CUDA=1 NEQ_CUDA_ARCHS='{archs}' pip install --no-build-isolation .
  It needs nvcc and a C++ compiler; if there is no nvcc, it says how to get one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``neq`` with the given arguments (None: those of the process); returns the exit code: 0,
    1 if a check failed, 2 for a mistake in the arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except UserError as error:
        print(f"neq {args.command}: {error}", file=sys.stderr)
        return USER_ERROR
    return code


class UserError(Exception):
    """Told to the user in one line, without a traceback."""


def doctor(args: argparse.Namespace) -> int:
    """Print what this machine runs and why; check every kernel."""
    print("Machine")
    print(_table([[name, str(value)] for name, value in _about().items()]))
    print("\nBackends")
    chosen, problem = _chosen_backends()
    print(_table(_backend_rows(chosen)))
    if problem:
        print(f"  {problem}")
    if torch.version.hip is None and torch.cuda.is_available() and not cuda.LIBRARY.exists():
        print(BUILD_CUDA.format(archs=_cuda_archs()))
    print("\nEnergy counters")
    print(_table(_energy_rows()))
    if problem:
        return FAILED_CHECK
    print("\nSelf-check against PyTorch in float64")
    return 0 if _self_check() else FAILED_CHECK


def count_flops(args: argparse.Namespace) -> int:
    """Print the FLOPs of one image through a model."""
    model = _model(args)
    height, width = args.size
    image = torch.zeros(1, args.in_channels or 3, height, width)
    try:
        count = flops.count(model, image)
    except Exception as error:  # whatever a stranger's forward raises
        shape = "x".join(map(str, image.shape))
        raise UserError(f"{args.model} cannot run on a {shape} batch: {error}") from error
    if args.json:
        print(json.dumps({"model": args.model, "size": list(args.size)} | count.to_dict()))
        return 0
    image_size = "x".join(map(str, image.shape[1:]))
    print(f"{args.model}, one {image_size} image: {flops.human(count.macs)} MACs forward")
    if args.layers:
        print(_table(_layer_rows(count), header=LAYER_HEADER))
    print(_table(_total_rows(count, args.convention)))
    if count.not_called:
        print(f"not called, not counted: {', '.join(count.not_called)}")
    return 0


def bench(args: argparse.Namespace) -> int:
    """Time the weight gradients of a model's layers."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = _model(args)
    images = torch.zeros(args.batch, args.in_channels or 3, *args.size)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    about = machine()
    print(f"{about.cpu}, {about.threads} threads, PyTorch {about.torch}; milliseconds, medians")
    print(_table([BENCH_HEADER], BENCH_WIDTHS))
    try:
        for time in layer_times(model, images, shares=args.shares, seconds=args.seconds):
            print(_table([_bench_row(time)], BENCH_WIDTHS), flush=True)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = "x".join(map(str, images.shape))
        raise UserError(f"{args.model} cannot be measured on a {shape} batch: {error}") from error
    return 0


def _bench_row(time: LayerTime) -> list[str]:
    more = f" (+{len(time.layers) - 1})" if len(time.layers) > 1 else ""
    medians = (time.seconds.get(strategy) for strategy in Strategy)
    return [
        time.layers[0] + more,
        f"{time.active}/{time.problem.neurons}",
        *("-" if q is None else f"{q.median * 1e3:.3f}" for q in medians),
        time.chosen.name.lower(),
        f"{time.speedup.median:.2f}x",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neq", description=__doc__)
    parser.add_argument("--version", action="version", version=f"neq {neq_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "doctor", help="which backends this machine gets and why; check every kernel"
    )
    command.set_defaults(run=doctor)

    command = commands.add_parser(
        "flops",
        help="FLOPs of one image through a model",
        description="FLOPs of one image through a model. Convolution, linear and norm layers are "
        "counted; see neq_kernels.flops for the rule.",
        epilog="examples: neq flops swin_b; neq flops benchmarks.common.models:resnet32 --size 32 "
        "--classes 10; neq flops deeplabv3_resnet50 --size 480 --classes 21 --option aux_loss=True",
    )
    _add_model_arguments(command)
    command.add_argument(
        "--convention",
        choices=flops.CONVENTIONS,
        help="paper: 2 x forward MACs x active share, one backward GEMM; executed: forward, dgrad "
        "and wgrad apart; both by default",
    )
    command.add_argument("--layers", action="store_true", help="one line per layer")
    command.add_argument("--json", action="store_true", help="everything, as JSON")
    command.set_defaults(run=count_flops)

    command = commands.add_parser(
        "bench",
        help="milliseconds of the weight gradient of each layer of a model",
        description="Milliseconds of the weight gradient of each distinct layer of a model on this "
        "CPU, by strategy, with random channels active, and how much faster the chosen strategy is "
        "than PyTorch's kernel for all channels.",
        epilog="example: neq bench resnet18 --batch 16 --size 128 --channels-last",
    )
    _add_model_arguments(command)
    command.add_argument("--batch", type=_positive, default=8, metavar="N", help="images (8)")
    command.add_argument(
        "--shares",
        type=_share,
        nargs="+",
        default=[0.5, 0.1],
        metavar="SHARE",
        help="of active channels (0.5 0.1)",
    )
    command.add_argument(
        "--seconds", type=_seconds, default=0.2, metavar="S", help="for each line (0.2)"
    )
    command.add_argument("--threads", type=_positive, metavar="N", help="PyTorch's own by default")
    command.add_argument("--channels-last", action="store_true", help="memory format of the images")
    command.set_defaults(run=bench)
    return parser


def _add_model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        help="torchvision:NAME, timm:NAME, package.module:callable, or a bare name, looked up in "
        "torchvision and then in timm",
    )
    command.add_argument(
        "--size", type=_size, default=DEFAULT_SIZE, metavar="HxW", help="image size (224x224)"
    )
    command.add_argument(
        "--classes", type=_positive, metavar="N", help="the model's own by default"
    )
    command.add_argument("--in-channels", type=_positive, metavar="C", help="3 by default")
    command.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="passed on to the model's constructor; may be repeated",
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text!r}")
    return share


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected HxW or one number, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _model(args: argparse.Namespace) -> torch.nn.Module:
    here = str(Path.cwd())
    if here not in sys.path:  # an installed command does not have it, a script of the user's does
        sys.path.insert(0, here)
    try:
        return named_model(args.model, args.classes, args.in_channels, **dict(args.option))
    except Exception as error:  # whatever a stranger's constructor raises
        raise UserError(str(error) or type(error).__name__) from error


def _layer_rows(count: flops.FlopCount) -> list[list[str]]:
    total = count.macs
    return [
        [
            row.name,
            row.kind,
            flops.human(row.macs),
            f"{row.macs / total:.1%}",
            flops.human(row.dgrad_macs),
            flops.human(row.wgrad_macs),
        ]
        for row in count.layers
    ]


def _total_rows(count: flops.FlopCount, convention: str | None) -> list[list[str]]:
    rows = []
    if convention in (None, "paper"):
        rule = "2 x forward MACs x active share: ONE backward GEMM"
        rows.append(["paper", flops.human(count.paper), rule])
    if convention in (None, "executed"):
        rows += [
            ["executed", flops.human(count.executed), "forward and backward:"],
            ["  forward", flops.human(count.forward), ""],
            ["  dgrad", flops.human(count.dgrad), "gradients of inputs"],
            ["  wgrad", flops.human(count.wgrad), "gradients of weights"],
        ]
    return rows


def _about() -> dict[str, Any]:
    facts: dict[str, Any] = dict(machine().to_dict())
    del facts["date"]
    facts["accelerator"] = facts["accelerator"] or "none that PyTorch can use"
    return facts | {
        "cuda of torch": torch.version.cuda or "not in this build",
        "triton": _version("triton"),
        "neq_kernels": neq_kernels.__version__,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _chosen_backends() -> tuple[dict[str, list[str]], str]:
    """Backend -> device types it is used for, and what is wrong with the user's own choice."""
    chosen: dict[str, list[str]] = {}
    try:
        for device in doctor_checks.device_types():
            for name in selector.backends_for(device):
                chosen.setdefault(name, []).append(device)
    except (ValueError, RuntimeError) as error:
        return chosen, str(error)
    return chosen, ""


def _backend_rows(chosen: dict[str, list[str]]) -> list[list[str]]:
    rows = []
    for name, reason in selector.availability():
        if name in chosen:
            rows.append([name, f"used for {' and '.join(chosen[name])} tensors"])
        else:
            rows.append([name, "not chosen" if reason is None else f"cannot be used: {reason}"])
    return rows


def _cuda_archs() -> str:
    """The compute capabilities of this machine's GPUs, as ``NEQ_CUDA_ARCHS`` takes them."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))


def _energy_rows() -> list[list[str]]:
    meter = EnergyMeter()
    rows = [[name, "counts"] for name in meter.counters]
    rows += [[missing.name, missing.reason] for missing in meter.missing]
    return rows if meter.counters else [*rows, ["", NO_COUNTER]]


def _self_check() -> bool:
    """Whether everything is right; backends for GPUs that are become a default."""
    checks = []
    for check in runner.run_apart():
        checks.append(check)
        verdict = "ok" if check.passed else f"FAILED in {len(check.failures)}"
        where = f"{check.backend} on {check.device}"
        print(_table([[check.op, where, f"{check.cases} cases", verdict]], CHECK_WIDTHS))
        for failure in check.failures[:SHOWN_FAILURES]:
            print(f"    {failure}")
    if "cuda" in doctor_checks.device_types():
        right = " and ".join(runner.prove(checks)) or "none"
        print(f"\nCustom kernels in use on this GPU from now on: {right}")
    return all(check.passed for check in checks)


def _table(
    rows: Sequence[Sequence[str]],
    widths: Sequence[int] = (),
    header: Sequence[str] = (),
) -> str:
    """Columns aligned, two spaces apart; the last one ends where its text ends."""
    lines = [header, *rows] if header else rows
    if not widths:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
