"""Weight gradients alone: every layer of the shape set, against what a user would write instead.

>>> python -m benchmarks.kernels.cpu --out runs/bench
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import cli
from benchmarks.common.records import Record, Row
from benchmarks.kernels import goals, peers
from benchmarks.kernels.comparison import (
    DENSE,
    MOST_ERROR,
    MOST_ERROR_OF_PEERS,
    OURS,
    PEER,
    TUNED,
    description,
    errors_over_dense,
    exact_gradient,
    peer_call,
    quantiles,
)
from benchmarks.kernels.layer_shapes import DTYPES, NAMES, QUICK, TINY, Shape, shape_set
from neq_kernels.backends.base import BackwardCall
from neq_kernels.backends.problem import KernelChoice, Problem, Strategy
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch import autotune, stopwatch, trial
from neq_kernels.dispatch import backward as dispatch
from neq_kernels.dispatch.contests import Contests
from neq_kernels.dispatch.selection import selector
from neq_kernels.measure.bandwidth import read_bandwidth

SHARES = ("1", "0.75", "0.5", "0.25", "0.1", "1/K")
QUICK_SHARES = ("1", "0.5", "0.1")
ALWAYS = (DENSE, PEER, OURS)


@dataclass(frozen=True)
class KernelOptions:
    """What is measured besides dense, the strongest peer and ours."""

    shares: Sequence[str]
    peers: Sequence[str]
    strategies: bool
    tuned: bool
    seconds: float


def measure(shape: Shape, options: KernelOptions, run: int) -> Iterator[Row]:
    """Rows of one shape. A provider whose gradient is wrong is not timed; its row says so."""
    problem = shape.problem
    grad_output, input, weight = trial.operands(problem)
    exact = exact_gradient(problem, grad_output, input, weight)
    k, done = problem.neurons, set()
    for share in options.shares:
        n = k if share == "1" else (1 if share == "1/K" else max(1, round(float(share) * k)))
        if n in done:
            continue
        done.add(n)
        channels = trial.spread(n, k)
        calls = _providers(problem, channels, grad_output, input, weight, options)
        about: Row = {
            "run": run,
            "network": shape.network,
            "layer": shape.layer,
            **description(problem),
            "layout": shape.layout,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "share": share,
            "active": n,
            "channels": k,
        }
        errors = errors_over_dense(calls, exact, channels)
        right = {}
        for name, error in errors.items():
            most = MOST_ERROR if name.startswith(OURS) else MOST_ERROR_OF_PEERS
            if error <= most:
                right[name] = calls[name]
            else:
                yield {**about, "provider": name, "wrong": f"{error:.1f} times the dense error"}
        chosen = selector.choice(problem, n, selector.context("cpu")).strategy
        samples = stopwatch.in_turns(right, options.seconds, least_rounds=5)
        for name in samples:
            row = {**about, "provider": name, "error_over_dense": errors[name]}
            row |= quantiles(name, samples)
            if name == OURS:
                row["strategy"] = chosen.name.lower()
            yield row


def _providers(
    problem: Problem,
    channels: ActiveChannels,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    options: KernelOptions,
) -> dict[str, Callable[[], Tensor]]:
    calls: dict[str, Callable[[], Tensor]] = {}
    active, n = channels.active, channels.n_active
    for name in (DENSE, PEER, *options.peers):
        provider = peers.PROVIDERS[name]
        if provider.why_not(problem.geometry, weight) or (provider.contiguous and n > 1):
            continue  # a peer for neighbouring channels is no peer for these
        calls[name] = peer_call(provider, problem, grad_output, input, weight, active)
    calls[OURS] = _ours(problem, channels, grad_output, input, weight)
    backend = selector.backends[selector.backends_for("cpu")[0]]
    usable = backend.strategies(problem)

    def by(strategy: Strategy) -> Callable[[], Tensor]:
        return trial.wgrad(
            problem, backend, KernelChoice(strategy), grad_output, input, weight, channels
        )

    if options.strategies:
        calls |= {f"{OURS} {s.name.lower()}": by(s) for s in usable}
    if options.tuned:
        possible = selector.candidates(problem, n, selector.context("cpu"))
        winner = autotune.fastest(problem, n, possible, seconds=options.seconds / 2)
        calls[TUNED] = by(winner.strategy)
    return calls


def _ours(
    problem: Problem, channels: ActiveChannels, grad_output: Tensor, input: Tensor, weight: Tensor
) -> Callable[[], Tensor]:
    """What a layer runs while its active channels do not change, what the library is in doubt of
    having been measured."""
    geometry = problem.geometry
    replaced = geometry is not None and dispatch.replaces_dense(input, weight, geometry)
    if channels.n_active == len(channels) and not replaced:
        return peer_call(peers.DENSE, problem, grad_output, input, weight, channels.active)

    selector.contests = Contests()  # with all the time that a training of this layer has
    undecided = _Wgrad(problem, channels, input, weight)
    undecided(grad_output)
    while selector.contests and selector.contests.allowance.is_left():
        undecided(grad_output)
    decided = _Wgrad(problem, channels, input, weight)
    return lambda: decided(grad_output)


class _Wgrad:
    """A layer's weight gradient while its active channels do not change."""

    def __init__(
        self, problem: Problem, channels: ActiveChannels, input: Tensor, weight: Tensor
    ) -> None:
        self._input, self._weight = input, weight
        geometry = problem.geometry
        if geometry is None:
            self._call = dispatch.linear_call(input, weight, channels, self._settle)
        else:
            self._call = dispatch.conv_call(input, weight, geometry, channels, self._settle)

    def __call__(self, grad_output: Tensor) -> Tensor:
        gradient = self._call(grad_output, self._input, self._weight, (False, True, False))[1]
        assert gradient is not None
        return gradient

    def _settle(self, quicker: BackwardCall) -> None:
        self._call = quicker


def _peak_flops(dtype: torch.dtype) -> float:
    """Per second, in a large matrix product of PyTorch's."""
    size = 1536
    a, b = (torch.randn(size, size).to(dtype) for _ in "ab")
    seconds = stopwatch.in_turns({"mm": lambda: a @ b}, 1.0)["mm"]
    return 2 * size**3 / min(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser(__spec__, __doc__)
    cli.add_common_arguments(parser)
    parser.add_argument(
        "--networks", nargs="+", choices=(*NAMES, TINY), metavar="NAME", help=f"of {NAMES}"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of operands and gradients"
    )
    parser.add_argument("--shares", nargs="+", choices=SHARES, help="of active channels")
    others = [name for name in peers.PROVIDERS if name not in ALWAYS]
    parser.add_argument("--peers", nargs="+", choices=others, default=[], help="more peers")
    parser.add_argument("--strategies", action="store_true", help="each strategy by itself too")
    parser.add_argument("--tuned", action="store_true", help="the measured choice of strategy too")
    parser.add_argument("--runs", type=cli.positive, help="independent runs (2; quick: 1)")
    parser.add_argument("--seconds", type=cli.seconds, help="for each cell (0.06; quick: 0.03)")
    args = parser.parse_args(arguments)
    cli.prepare(args)
    runs = args.runs or (1 if args.quick else 2)
    options = KernelOptions(
        shares=args.shares or (QUICK_SHARES if args.quick else SHARES),
        peers=args.peers,
        strategies=args.strategies,
        tuned=args.tuned,
        seconds=args.seconds or (0.03 if args.quick else 0.06),
    )
    dtype = DTYPES[args.dtype]
    shapes = shape_set(args.networks or (QUICK if args.quick else NAMES), dtype)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings |= {"peak_flops": _peak_flops(dtype), "read_bandwidth": read_bandwidth("cpu")}
    with Record(args.out, "kernels", settings) as record:
        for run in range(runs):
            for i, shape in enumerate(shapes):
                print(f"\rrun {run + 1}/{runs}, shape {i + 1}/{len(shapes)}", end="", flush=True)
                for row in measure(shape, options, run):
                    record.add(row)
    print()
    for provider in (OURS, TUNED) if args.tuned else (OURS,):
        print(f"\n{provider}")
        judged = goals.judge(record.rows, provider)
        print(goals.text(judged, cli.verdict))
    wrong = [row for row in record.rows if "wrong" in row]
    for row in wrong:
        print(f"wrong: {row['provider']} on {row['network']} {row['layer']}: {row['wrong']}")
    return cli.WRONG_RESULT if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
