"""The ``neq`` command: what this machine runs, and what a model costs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

import neq_kernels
from neq_kernels.backends import cuda
from neq_kernels.backends.problem import Strategy
from neq_kernels.cli_arguments import (
    UserError,
    add_model_arguments,
    image_of,
    model_of,
    positive,
    seconds,
    share,
)
from neq_kernels.conversion.convert import convert
from neq_kernels.dispatch import calibration
from neq_kernels.dispatch.selection import selector
from neq_kernels.dispatch.tuning_table import tuning_mode
from neq_kernels.doctor import checks as doctor_checks
from neq_kernels.doctor import runner
from neq_kernels.layers.traversal import neuron_layers
from neq_kernels.machine import machine
from neq_kernels.measure import EnergyMeter, flops
from neq_kernels.measure.energy import NO_COUNTER
from neq_kernels.measure.explain import explain
from neq_kernels.measure.layer_times import LayerTime, layer_times

FAILED_CHECK = 1
USER_ERROR = 2
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
    print("\nChoice of kernels on this CPU")
    print(_table(_choice_rows()))
    print("\nEnergy counters")
    print(_table(_energy_rows()))
    if problem:
        return FAILED_CHECK
    print("\nSelf-check against PyTorch in float64")
    return 0 if _self_check() else FAILED_CHECK


def count_flops(args: argparse.Namespace) -> int:
    """Print the FLOPs of one image through a model."""
    model = model_of(args)
    image = image_of(args)
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


def tell(args: argparse.Namespace) -> int:
    """Convert a model and print what freezing saves in it."""
    model = model_of(args)
    try:
        layers = neuron_layers(convert(model))
        for layer in layers[: round((args.freeze or 0) * len(layers))]:
            layer.channels.set([])
        explanation = explain(model, image_of(args))
    except Exception as error:  # whatever a stranger's forward raises
        raise UserError(f"{args.model} cannot be explained: {error}") from error
    if args.json:
        print(json.dumps({"model": args.model, "size": list(args.size)} | explanation.to_dict()))
    else:
        print(explanation)
    return 0


def bench(args: argparse.Namespace) -> int:
    """Time the weight gradients of a model's layers."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = model_of(args)
    images = image_of(args, args.batch)
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
    add_model_arguments(command)
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
        "explain",
        help="what of a model is in neurons, where backprop stops, and what keeps it alive",
        description="What of a model is in neurons once it is converted, where backprop stops, "
        "which parameters keep it alive, and the most that freezing saves, by FLOPs, for one "
        "image.",
        epilog="example: neq explain vit_b_16 --freeze 0.5",
    )
    add_model_arguments(command)
    command.add_argument(
        "--freeze",
        type=share,
        metavar="SHARE",
        help="freeze this share of the layers wholly, from the first one on (none)",
    )
    command.add_argument("--json", action="store_true", help="everything, as JSON")
    command.set_defaults(run=tell)

    command = commands.add_parser(
        "bench",
        help="milliseconds of the weight gradient of each layer of a model",
        description="Milliseconds of the weight gradient of each distinct layer of a model on this "
        "CPU, by strategy, with random channels active, and how much faster the chosen strategy is "
        "than PyTorch's kernel for all channels.",
        epilog="example: neq bench resnet18 --batch 16 --size 128 --channels-last",
    )
    add_model_arguments(command)
    command.add_argument("--batch", type=positive, default=8, metavar="N", help="images (8)")
    command.add_argument(
        "--shares",
        type=share,
        nargs="+",
        default=[0.5, 0.1],
        metavar="SHARE",
        help="of active channels (0.5 0.1)",
    )
    command.add_argument(
        "--seconds", type=seconds, default=0.2, metavar="S", help="for each line (0.2)"
    )
    command.add_argument("--threads", type=positive, metavar="N", help="PyTorch's own by default")
    command.add_argument("--channels-last", action="store_true", help="memory format of the images")
    command.set_defaults(run=bench)
    return parser


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


def _choice_rows() -> list[list[str]]:
    """What kernels for CPU tensors are chosen by."""
    try:
        context = selector.context("cpu")
        known, winners = selector.costs.calibration(context), len(selector.table(context))
    except (ValueError, RuntimeError) as error:
        return [["costs", f"none: {error}"]]
    if known.misfit is None:
        calibrated = "not yet: in the first backward of a partly frozen layer"
        if not context.measures or not calibration.is_asked_for():
            calibrated = "off"
    else:
        calibrated = f"times lie within a factor of {math.exp(known.misfit):.2f} of the table"
    costs = "no table: custom kernels need a measured win" if known.table is None else known.table
    measured = f"{winners} winners, NEQ_KERNELS_TUNE={tuning_mode()}"
    return [["costs", costs], ["calibrated", calibrated], ["measured", measured]]


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
