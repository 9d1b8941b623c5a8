"""Weight gradients alone on a GPU: PyTorch's, a careful user's, and ours by each strategy.

>>> python -m benchmarks.kernels.gpu --seconds 200 --out runs/gpu
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.common import cli, gpu_device
from benchmarks.common.deadline import Deadline
from benchmarks.common.gpu_device import OUT_OF_MEMORY, DeviceLost, Lab
from benchmarks.common.interrupt import Interrupted, Interruptible
from benchmarks.common.records import Record, Row
from benchmarks.kernels import comparison, peers
from benchmarks.kernels.comparison import DENSE, MOST_ERROR, OURS, PEER
from benchmarks.kernels.layer_shapes import Shape, gpu_shapes
from neq_kernels import ops
from neq_kernels.backends.problem import Problem, Strategy
from neq_kernels.channels import ActiveChannels
from neq_kernels.dispatch import trial
from neq_kernels.dispatch.execution_context import ExecutionContext
from neq_kernels.dispatch.selection import selector
from neq_kernels.dispatch.stopwatch import cold_times

NAME = "gpu_kernels"
SHARES = (1.0, 0.5, 0.25, 0.1, 0.02)
# Of float32 that a tensor core reads: ten bits of fraction.
TF32_ROUNDING = 2.0**-10
COLUMNS = (
    ("layer", -44),
    ("layout", -6),
    ("dtype", -8),
    ("r", 4),
    ("dense us", 9),
    ("peer1", 6),
    ("neq", 6),
    ("strategy", -8),
    ("custom", 6),
    ("pack", 6),
    ("dense", 6),
    ("aten", 6),
)


@dataclass(frozen=True)
class GpuKernelOptions:
    """``seconds`` for each cell; backends in ``failed`` are not timed."""

    shares: tuple[float, ...] = SHARES
    seconds: float = 0.25
    failed: tuple[str, ...] = ()


Call = Callable[[], Tensor]


def measure(
    shape: Shape, options: GpuKernelOptions, lab: Lab, deadline: Deadline, check: Callable[[], None]
) -> Iterator[Row]:
    """Rows of one shape: of every provider with every share of its channels active. What is wrong,
    fails or has no time left says so."""
    problem = shape.problem
    about: Row = {
        "network": shape.network,
        "layer": shape.layer,
        **comparison.description(problem),
        "layout": shape.layout,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }
    k = problem.neurons
    cells = None
    for share in options.shares:
        check()
        channels = trial.spread(max(1, round(share * k)), k)
        cell = about | {"share": share, "active": channels.n_active, "channels": k}
        if deadline.passed:
            yield cell | {"left_out": True}
            continue
        try:
            cells = cells or _Cells(problem, options, lab)
            yield from (cell | row for row in cells.rows(channels))
        except DeviceLost:
            raise
        except Exception as failure:  # one cell that does not fit is no reason to lose the others
            yield cell | {"error": lab.survived(failure)}


class _Cells:
    """The operands of one shape on the device, and their exact gradient."""

    def __init__(self, problem: Problem, options: GpuKernelOptions, lab: Lab) -> None:
        self._problem, self._options, self._lab = problem, options, lab
        self._operands = trial.operands(problem, lab.device)
        self._exact = comparison.exact_gradient(problem, *self._operands)

    def rows(self, channels: ActiveChannels) -> Iterator[Row]:
        calls = self._calls(channels)
        rounding = _rounding(self._problem)
        unit = comparison.unit_of_error(self._exact, self._exact, rounding)
        right, errors = {}, {}
        for name, call in calls.items():
            backend = self._backend_of(name)
            if backend in self._options.failed:
                yield {"provider": name, "error": f"not timed: tests of {backend} failed"}
                continue
            try:
                gradient = call()
                if name == DENSE:
                    unit = comparison.unit_of_error(gradient, self._exact, rounding)
                error = comparison.largest_error(name, gradient, self._exact, channels)
            except Exception as failure:  # whatever a kernel that fails raises belongs in the page
                yield {"provider": name, "error": self._lab.survived(failure)}
                continue
            errors[name] = error / unit
            if errors[name] <= MOST_ERROR:
                right[name] = call
            else:
                yield {"provider": name, "wrong": f"{errors[name]:.1f} times the dense error"}
        if not right:
            return
        samples = cold_times(right, self._lab.clock, self._options.seconds)
        for name in samples:
            row = {"provider": name, "error_over_dense": errors[name]}
            row |= comparison.quantiles(name, samples)
            row["rounds"] = len(samples[name])
            if name == OURS:
                row["strategy"] = self._chosen(channels).name.lower()
            yield row

    def _backend_of(self, name: str) -> str | None:
        """Whose tests have to have passed; None for what is not ours."""
        if not name.startswith(OURS):
            return None
        words = name.split()
        return words[1] if len(words) > 1 and words[1] in self._lab.others else self._lab.backend

    def _chosen(self, channels: ActiveChannels) -> Strategy:
        n = channels.n_active
        if n == len(channels):
            return Strategy.DENSE
        context = ExecutionContext((self._lab.backend,), "cuda", 0)
        return selector.choice(self._problem, n, context).strategy

    def _calls(self, channels: ActiveChannels) -> dict[str, Call]:
        """Providers by name, dense first."""
        problem, operands, n = self._problem, self._operands, channels.n_active
        active = channels.active.to(self._lab.device)
        calls: dict[str, Call] = {}
        for name in (DENSE, PEER):
            provider = peers.PROVIDERS[name]
            if provider.why_not(problem.geometry, operands[2]) is None:
                calls[name] = comparison.peer_call(provider, problem, *operands, active)
        own = self._lab.backend
        context = ExecutionContext((own,), "cuda", 0)
        calls[OURS] = _layer(problem, *operands, channels, own)
        # With every channel active a layer, and all strategies but one, make PyTorch's call.
        partly = n < problem.neurons
        if partly:
            for other in self._lab.others:
                if other != own:
                    calls[f"{OURS} {other}"] = _layer(problem, *operands, channels, other)
        for choice, backend in selector.candidates(problem, n, context).items():
            if not (partly or choice.strategy == Strategy.CUSTOM):
                continue
            name = f"{OURS} {choice.strategy.name.lower()}"
            if name in calls:  # the default runs another way
                name = f"{name} {'x'.join(map(str, choice.settings))}"
            calls[name] = trial.wgrad(problem, backend, choice, *operands, channels)
        return calls


def _layer(
    problem: Problem,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    channels: ActiveChannels,
    backend: str,
) -> Call:
    """What a layer runs in backward for its weight."""
    geometry, wanted = problem.geometry, [False, True, False]
    if channels.n_active == len(channels):
        return comparison.peer_call(
            peers.DENSE, problem, grad_output, input, weight, channels.active
        )

    active = channels.tensors(grad_output.device)

    def wgrad() -> Tensor:
        with selector.forced_backend(backend):
            if geometry is None:
                grads = ops.linear_backward(
                    grad_output, input, input.shape, weight, active, wanted, False
                )
            else:
                grads = ops.conv_backward(
                    grad_output, input, input.shape, weight, geometry, active, wanted, False
                )
        assert grads[1] is not None
        return grads[1]

    return wgrad


def _rounding(problem: Problem) -> float:
    operation = "matmul" if problem.geometry is None else "conv"
    if problem.dtype == torch.float32 and gpu_device.allows_tf32(operation):
        return TF32_ROUNDING
    return torch.finfo(problem.dtype).eps


def run(
    shapes: Sequence[Shape], options: GpuKernelOptions, lab: Lab, deadline: Deadline, record: Record
) -> bool:
    """Measure, print and write every cell; whether every gradient was right."""
    table = cli.Table(COLUMNS)
    right = True
    with Interruptible() as stop:
        for shape in shapes:
            cell: list[Row] = []
            for row in measure(shape, options, lab, deadline, stop.check):
                record.add(row)
                right &= "wrong" not in row and row.get("error", OUT_OF_MEMORY) == OUT_OF_MEMORY
                if cell and cell[-1].get("share") != row.get("share"):
                    _show(table, cell)
                    cell = []
                cell.append(row)
            _show(table, cell)
            lab.free()
    return right


def _show(table: cli.Table, cell: Sequence[Row]) -> None:
    first, by_name = cell[0], {row.get("provider"): row for row in cell}

    def ratio(name: str) -> str:
        row = by_name.get(name, {})
        return f"{row['over_dense_median']:.2f}" if "over_dense_median" in row else "-"

    wrong = [f"{row.get('provider', '')} {row['wrong']}" for row in cell if "wrong" in row]
    wrong += [f"{row.get('provider', '')} {row['error']}" for row in cell if "error" in row]
    dense, ours = by_name.get(DENSE, {}), by_name.get(OURS, {})
    table.line(
        [
            f"{first['network']} {first['layer']}"[:44],
            first["layout"],
            first["dtype"],
            f"{first['share']:g}" if "share" in first else "",
            f"{dense['seconds_median'] * 1e6:.1f}" if "seconds_median" in dense else "-",
            *(ratio(PEER), ratio(OURS)),
            ours.get("strategy", "-"),
            *(ratio(f"{OURS} {name}") for name in ("custom", "pack", "dense", "aten")),
        ],
        "no time left" if "left_out" in first else cli.red("; ".join(wrong)) if wrong else "",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    given = gpu_device.phase_parser(__spec__, __doc__, 200.0).parse_args(arguments)
    deadline = Deadline.after(given.seconds)
    if not gpu_device.found():
        return gpu_device.nothing_measured()
    lab = Lab.on_gpu()
    options = GpuKernelOptions(failed=tuple(given.failed))
    try:
        with Record(given.out, NAME, asdict(options) | {"backend": lab.backend}) as record:
            right = run(gpu_shapes(), options, lab, deadline, record)
    except (OSError, Interrupted, DeviceLost) as error:
        return gpu_device.exit_code(NAME, error)
    return 0 if right else cli.WRONG_RESULT


if __name__ == "__main__":
    sys.exit(main())
