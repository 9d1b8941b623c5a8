"""What a layer costs besides its arithmetic: forward and backward of tiny layers on one thread.

>>> python -m benchmarks.overheads.overhead --out runs/bench

``empty`` is an autograd.Function with the same saved tensors that hands out results computed
beforehand. Overhead is what our layer takes beyond it and beyond the library's own forward and
input gradient: the weight gradient, and all that surrounds it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neq_kernels as neq
from benchmarks.common import cli
from benchmarks.common.records import Record, Row
from neq_kernels.backends.problem import ConvGeometry
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch import backward as dispatch_backward
from neq_kernels.dispatch import stopwatch
from neq_kernels.dispatch.selection import selector
from neq_kernels.measure.timing import Quantiles

TARGET = 30e-6
LIBRARY_FORWARD = "part: the library's forward"
LIBRARY_DGRAD = "part: the library's input gradient"
Step = Callable[[], object]


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, output: Tensor, grads: Any
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.grads = grads
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        del input, weight
        return *ctx.grads, None, None


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """Tiny layers, each with an input."""
    torch.manual_seed(0)
    return {
        "linear 16 to 16, 8 rows": (nn.Linear(16, 16), torch.randn(8, 16)),
        "conv 8 to 8, 1x1, 4x4 pixels": (nn.Conv2d(8, 8, 1), torch.randn(2, 8, 4, 4)),
        "conv 8 to 8, 3x3, 4x4 pixels": (nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 4, 4)),
    }


def measure(name: str, layer: nn.Module, x: Tensor, seconds: float) -> list[Row]:
    """One row for each thing that is timed, and one for the overhead."""
    x.requires_grad_()
    output = layer(x).detach()
    grad_output = torch.randn_like(output)
    grads = [
        g.clone() for g in torch.autograd.grad(layer(x), [x, *layer.parameters()], grad_output)
    ]
    parameters = list(layer.parameters())
    ours = neq.convert(nn.Sequential(type(layer)(**_arguments(layer))))[0]
    ours.load_state_dict(layer.state_dict())
    channels = ours.channels
    channels.set(list(range(0, len(channels), 2)))

    def step(forward: Callable[[], Tensor], learned: Sequence[nn.Parameter]) -> Step:
        def run() -> None:
            forward().backward(grad_output)
            x.grad = None
            for parameter in learned:
                parameter.grad = None

        return run

    weight, bias = parameters
    calls: dict[str, Step] = {
        "empty": step(lambda: _Empty.apply(x, weight, bias, output, grads), parameters),
        "torch": step(lambda: layer(x), parameters),
        "neq": step(lambda: ours(x), list(ours.parameters())),
        **_parts(ours, channels, x.detach(), grad_output),
    }
    samples = stopwatch.in_turns(calls, seconds, most_rounds=20_000)
    rows = [{"case": name, "what": what, **_quantiles(taken)} for what, taken in samples.items()]
    known = [samples[what] for what in ("empty", LIBRARY_FORWARD, LIBRARY_DGRAD)]
    beyond = [whole - sum(parts) for whole, *parts in zip(samples["neq"], *known, strict=True)]
    return [*rows, {"case": name, "what": "overhead", **_quantiles(beyond)}]


def _parts(
    layer: nn.Module, channels: ActiveChannels, x: Tensor, grad_output: Tensor
) -> dict[str, Step]:
    """What our step is made of, each by itself, from the inside out."""
    weight, bias = (p.detach() for p in layer.parameters())
    wanted = (True, True, True)
    if isinstance(layer, nn.Linear):
        call = dispatch_backward.linear_call(x, weight, channels)
        forward = lambda: F.linear(x, weight, bias)  # noqa: E731
        dgrad = lambda: grad_output.mm(weight)  # noqa: E731
    else:
        assert isinstance(layer, nn.Conv2d)
        assert not isinstance(layer.padding, str)
        arguments = layer.stride, layer.padding, layer.dilation
        geometry = ConvGeometry(*arguments, False, (0, 0), layer.groups)
        call = dispatch_backward.conv_call(x, weight, geometry, channels)
        forward = lambda: F.conv2d(x, weight, bias, *arguments, layer.groups)  # noqa: E731
        dgrad = lambda: geometry.backward(grad_output, x, weight, (True, False, False))  # noqa: E731
    return {
        LIBRARY_FORWARD: forward,
        LIBRARY_DGRAD: dgrad,
        "part: all three gradients": lambda: call(grad_output, x, weight, wanted),
    }


def _arguments(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    assert isinstance(layer, nn.Conv2d)
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "padding": layer.padding,
    }


def _quantiles(seconds: Sequence[float]) -> Row:
    q = Quantiles.of(seconds)
    return {"seconds_p20": q.p20, "seconds_median": q.median, "seconds_p80": q.p80}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overheads.overhead", description=__doc__
    )
    cli.add_common_arguments(parser)
    parser.add_argument("--seconds", type=cli.seconds, help="for each case (5; quick: 0.5)")
    args = parser.parse_args(arguments)
    if selector.backends_for("cpu")[0] != "cpu":
        print(
            "benchmarks.overheads.overhead: it measures the C++ extension, which is not in use here"
        )
        return cli.USER_ERROR
    cli.prepare(args, threads=1)
    seconds = args.seconds or (0.5 if args.quick else 5.0)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    table = cli.Table([("case", -30), ("what", -38), ("us, median", 10), ("p20", 7), ("p80", 7)])
    with Record(args.out, "overhead", settings) as record:
        for name, (layer, x) in cases().items():
            for row in measure(name, layer, x, seconds):
                passes = row["seconds_median"] <= TARGET if row["what"] == "overhead" else None
                record.add(row | ({} if passes is None else {"passes": passes}))
                figures = (row[f"seconds_{q}"] * 1e6 for q in ("median", "p20", "p80"))
                table.line(
                    [name, row["what"], *(f"{us:.1f}" for us in figures)],
                    cli.verdict(passes, f"<= {TARGET * 1e6:.0f}"),
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
