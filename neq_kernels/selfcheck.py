"""Every kernel of this machine against PyTorch in float64: the check that ``neq doctor`` runs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from neq_kernels import dispatch, functional, ops, proofs
from neq_kernels.backends import cpu
from neq_kernels.channels import ActiveChannels, NeuronLayout
from neq_kernels.optim import rows
from neq_kernels.optim.batches import Batches, RowStep
from neq_kernels.problem import Strategy
from neq_kernels.selfcheck_cases import CASES, GPU_CASES, LAYOUTS, OPTIMIZERS, Case

logger = logging.getLogger(__name__)

ORACLE = "reference"
ANY = "any"
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT64_TOLERANCE = 1e-12
# Float16 cannot hold the usual one.
FLOAT16_EPS = 1e-4
SEED = 2022


@dataclass(frozen=True)
class Check:
    """One op on one backend and device. ``failures`` says which cases were wrong, and how."""

    op: str
    backend: str
    device: str
    cases: int
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def about(self) -> tuple[str, str, str]:
        """Op, backend and device."""
        return self.op, self.backend, self.device


OPS = (
    *("linear_backward", "conv_backward", "channel_similarity"),
    *("SGD row step", "Adam row step", "AdamW row step"),
)

# Contexts in which gradients are computed.
_Way = tuple[Callable[[], AbstractContextManager[None]], ...]
_BY_RULE: _Way = ()
_PACKED: _Way = (functools.partial(dispatch.forced_strategy, Strategy.PACK),)
_FUSED: _Way = (functools.partial(dispatch.forced_strategy, Strategy.FUSED),)
_REPLAYED: _Way = (*_FUSED, dispatch.capturable)


def run_apart() -> Iterator[Check]:
    """:func:`run` in a process of its own, on the same GPU: a kernel that crashes is a failed
    check."""
    command = [sys.executable, "-m", "neq_kernels.selfcheck"]
    if torch.cuda.is_available():
        command.append(str(torch.cuda.current_device()))
    n = 0
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            saved = json.loads(line)
            n += 1
            yield Check(**saved | {"failures": tuple(saved["failures"])})
        code = process.wait()
        errors.seek(0)
        last_words = errors.read().strip().splitlines()[-1:]
    if code:
        reason = "; ".join([f"the process died (exit code {code})", *last_words])
        yield Check(f"check {n + 1}, the rest", ANY, ANY, 0, (reason,))


def prove(checks: Iterable[Check] | None = None) -> tuple[str, ...]:
    """The backends for GPUs that are right on this one; they serve by themselves from now on, here
    and in later processes. Where a check could not be finished nothing is remembered.

    Args:
        checks: the outcome of :func:`run`; None runs them apart.
    """
    checks = list(run_apart() if checks is None else checks)
    for failed in (check for check in checks if not check.passed):
        logger.warning("%s of %s on %s is wrong: %s", *failed.about, failed.failures[0])
    if any(check.backend == ANY for check in checks):
        return ()
    on_gpu = [check for check in checks if check.device == "cuda"]
    right = tuple(
        name
        for name in dispatch.FOR_GPUS
        if {check.op for check in on_gpu if check.backend == name} == set(OPS)
        and all(check.passed for check in on_gpu if check.backend == name)
    )
    proofs.keep(right)
    dispatch.backends_for.cache_clear()
    dispatch.forget_choices()
    return right if proofs.proved() is not None else ()


def run() -> Iterator[Check]:
    """Check every op on every backend that serves a device of this machine. Takes seconds; minutes
    where Triton compiles for the first time.

    Random state, the choice of backend and PyTorch's float32 precision are left as they were.
    """
    with torch.random.fork_rng(devices=[]), _full_precision():
        for backend, device in served():
            with forced(backend):
                yield from (_gradients(op, backend, device) for op in CASES)
                yield _similarity(backend, device)
        yield from _row_steps()


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32: whether the library rounds to it depends on the kernel that it picks, and its error
    is the measure of ours."""
    backends: Any = torch.backends
    settings = backends.cuda.matmul, backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def served() -> Iterator[tuple[str, str]]:
    """Every (backend, device type) of this machine but the oracle itself."""
    for (backend, _), device in itertools.product(dispatch.backends(), device_types()):
        if backend != ORACLE and dispatch.why_not(backend, device) is None:
            yield backend, device


def device_types() -> list[str]:
    """The device types that PyTorch can use here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Within it, everything is served by ``backend``."""
    before = os.environ.get(dispatch.ENVIRONMENT_VARIABLE)
    os.environ[dispatch.ENVIRONMENT_VARIABLE] = backend
    dispatch.backends_for.cache_clear()
    try:
        yield
    finally:
        del os.environ[dispatch.ENVIRONMENT_VARIABLE]
        if before is not None:
            os.environ[dispatch.ENVIRONMENT_VARIABLE] = before
        dispatch.backends_for.cache_clear()


def _masks(k: int) -> dict[str, list[int]]:
    return {
        "none": [],
        "one": [k - 1],
        "a run": list(range(1, 1 + k // 2)),
        "scattered": list(range(0, k, 2)),
        "all": list(range(k)),
    }


def _gradients(op: str, backend: str, device: str) -> Check:
    """Of an own backend for GPUs by each strategy, because which one goes by rule depends on the
    size of a layer, and as a CUDA graph would replay it."""
    failures = []
    n = 0
    cases, dtypes, ways = CASES[op], DTYPES, [_BY_RULE]
    if backend in dispatch.FOR_GPUS:
        cases, dtypes, ways = cases + GPU_CASES[op], GPU_DTYPES, [_PACKED, _FUSED, _REPLAYED]
    for way in ways:
        with contextlib.ExitStack() as within:
            for enter in way:
                within.enter_context(enter())
            for case, dtype in itertools.product(cases, dtypes):
                for mask, active in _masks(case.n_channels).items():
                    n += 1
                    problem = _wrong_gradient(case, dtype, active, backend, device)
                    if problem:
                        failures.append(f"{case.name}, {dtype}, active: {mask}: {problem}")
    return Check(op, backend, device, n, tuple(failures))


def _wrong_gradient(
    case: Case, dtype: torch.dtype, active: list[int], backend: str, device: str
) -> str:
    """Empty if the three gradients are right. The error allowed is twice that of PyTorch's dense
    gradient in the same dtype, and one rounding."""
    torch.manual_seed(SEED)
    channels = ActiveChannels(case.n_channels)
    channels.set(active)
    shapes = (case.input, case.weight, (case.n_channels,))
    leaves = [_coarse(_leaf(shape, dtype, device, case.channels_last)) for shape in shapes]
    try:
        with forced(backend):
            ours = _backward(case, leaves, channels, dtype)
    except Exception as error:  # whatever a broken kernel raises belongs into the report
        return f"{type(error).__name__}: {error}"
    with forced(ORACLE):
        exact = _backward(case, [leaf.double().cpu() for leaf in leaves], channels, dtype)
        stock = _backward(case, leaves, channels, dtype)
    for name, got, same_dtype, want in zip(
        ("input", "weight", "bias"), ours, stock, exact, strict=True
    ):
        # In float64 PyTorch is the oracle and has no error of its own to compare with.
        rounding = FLOAT64_TOLERANCE if dtype == torch.float64 else torch.finfo(dtype).eps
        allowed = 2 * _distance(same_dtype, want) + rounding * _largest(want)
        off = _distance(got, want)
        if not off <= allowed:
            return f"{name} gradient off by {off:.2e}, allowed {allowed:.2e}"
    for name, got in (("weight", ours[1]), ("bias", ours[2])):
        layout = _layout(case) if name == "weight" else NeuronLayout()
        if layout.gather(got, channels.frozen.to(device)).count_nonzero():
            return f"{name} gradient of frozen neurons is not 0"
    return ""


def _leaf(shape: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool) -> Tensor:
    tensor = torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)
    if channels_last and tensor.dim() == 4:
        tensor = tensor.to(memory_format=torch.channels_last)
    return tensor


def _coarse(values: Tensor) -> Tensor:
    """Quarters: their products have sums that float32 holds exactly, in whatever order."""
    return (values * 4).round() / 4


def _backward(
    case: Case, leaves: Sequence[Tensor], channels: ActiveChannels, dtype: torch.dtype
) -> list[Tensor]:
    """Gradients for an output gradient whose values ``dtype`` can hold."""
    input, weight, bias = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    if case.conv is None:
        output = functional.linear(input, weight, bias, channels)
    else:
        output = functional.conv(input, weight, bias, channels, **case.conv)
    generator = torch.Generator().manual_seed(SEED)
    values = _coarse(torch.randn(output.shape, generator=generator, dtype=torch.float64))
    grad = torch.empty_like(output).copy_(values)  # lies as the output does
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
    return list(grads)


def _layout(case: Case) -> NeuronLayout:
    if case.conv is not None and case.conv.get("transposed"):
        return NeuronLayout(case.conv.get("groups", 1), axis=1)
    return NeuronLayout()


def _similarity(backend: str, device: str) -> Check:
    """Integer values, so that the sums are exact in any order."""
    failures = []
    shapes = (((4, 7), 1), ((3, 6, 5, 5), 1), ((2, 9, 8), 2))
    for (shape, dim), dtype in itertools.product(shapes, DTYPES):
        torch.manual_seed(SEED)
        a, b = (torch.randint(-3, 4, shape).to(device=device, dtype=dtype) for _ in range(2))
        exact = torch.stack(
            [
                (x.double() * y.double()).movedim(dim, 0).flatten(1).sum(1)
                for x, y in ((a, b), (a, a), (b, b))
            ]
        )
        try:
            got = ops.channel_similarity(a, b, dim)
        except Exception as error:  # as above
            failures.append(f"{shape}, {dtype}: {type(error).__name__}: {error}")
            continue
        if not torch.equal(got, exact):
            failures.append(f"{shape}, {dtype}: sums off by {_distance(got, exact):.2e}")
    return Check("channel_similarity", backend, device, 3 * len(DTYPES), tuple(failures))


def _row_steps() -> Iterator[Check]:
    """Row steps against torch's own optimizers, frozen rows bit for bit."""
    steppers: list[tuple[str, ModuleType, str]] = [("torch", rows, "cpu")]
    if cpu.unavailable() is None:
        steppers.append(("cpu", cpu, "cpu"))
    for backend, device in served():
        if backend in dispatch.FOR_GPUS:
            steppers.append((backend, dispatch.FOR_GPUS[backend], device))
    for (backend, module, device), name in itertools.product(steppers, ("SGD", "Adam", "AdamW")):
        failures = []
        n = 0
        is_for_gpus = backend in dispatch.FOR_GPUS
        dtypes = GPU_DTYPES if is_for_gpus else (torch.float64,)
        kinds = [(kind, options) for kind, options in OPTIMIZERS if kind.__name__ == name]
        for (kind, options), layout, dtype in itertools.product(kinds, LAYOUTS, dtypes):
            label, shape, where, channels_last = layout
            parameter = _leaf(shape, dtype, device, channels_last)
            if is_for_gpus and not module.steps_rows(parameter, where):
                continue
            if dtype == torch.float16 and name != "SGD":
                options = options | {"eps": FLOAT16_EPS}
            for mask, active in _masks(where.n_neurons(parameter)).items():
                n += 1
                problem = _wrong_step(module, kind, options, parameter, where, active)
                if problem:
                    failures.append(f"{label}, {dtype}, {options}, active: {mask}: {problem}")
        yield Check(f"{name} row step", backend, device, n, tuple(failures))


def _wrong_step(
    module: ModuleType,
    optimizer: type[torch.optim.Optimizer],
    options: dict[str, Any],
    start: Tensor,
    layout: NeuronLayout,
    active: list[int],
) -> str:
    """Empty if three steps are right. The error allowed is as for gradients."""
    channels = ActiveChannels(layout.n_neurons(start))
    channels.set(active)
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    exact = torch.nn.Parameter(start.to(torch.float64, copy=True))
    stock, in_float64 = optimizer([theirs], **options), optimizer([exact], **options)
    step = _row_step(module, stock, ours, channels, layout)
    torch.manual_seed(SEED)
    try:
        for _ in range(3):
            theirs.grad = torch.randn_like(theirs)
            exact.grad = theirs.grad.double()
            step(theirs.grad.clone())
            stock.step()
            in_float64.step()
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}"
    moving, held = (index.to(start.device) for index in (channels.active, channels.frozen))
    got, same_dtype, want = (
        layout.gather(tensor.detach(), moving) for tensor in (ours, theirs, exact)
    )
    is_float64 = start.dtype == torch.float64
    rounding = FLOAT64_TOLERANCE if is_float64 else torch.finfo(start.dtype).eps
    allowed = 2 * _distance(same_dtype, want) + rounding * max(_largest(want), 1.0)
    off = _distance(got, want)
    if not off <= allowed:
        return f"active rows off by {off:.2e}, allowed {allowed:.2e}"
    if not torch.equal(layout.gather(ours, held), layout.gather(start, held)):
        return "frozen rows moved"
    return ""


def _row_step(
    module: ModuleType,
    stock: torch.optim.Optimizer,
    parameter: Tensor,
    channels: ActiveChannels,
    layout: NeuronLayout,
) -> Callable[[Tensor], None]:
    group = stock.param_groups[0]
    device = parameter.device
    steps = torch.zeros(len(channels), dtype=torch.int64, device=device)
    shared = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
    state: tuple[Tensor | None, ...]
    if isinstance(stock, torch.optim.SGD):
        keys = ("momentum", "dampening", "nesterov")
        shared |= {name: group[name] for name in keys}
        state = torch.zeros_like(parameter) if group["momentum"] else None, steps
        function = "sgd_rows_"
    else:
        shared |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}
        shared["decoupled"] = isinstance(stock, torch.optim.AdamW)
        mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
        largest = torch.zeros_like(parameter) if group["amsgrad"] else None
        state = mean, square, largest, steps
        function = "adam_rows_"
    row_step = RowStep(parameter, state, channels.order(device), channels.n_active, layout, module)
    batches = Batches(function, [row_step])

    def step(grad: Tensor) -> None:
        parameter.grad = grad
        batches.run(shared)

    return step


def _distance(a: Tensor, b: Tensor) -> float:
    """In the maximum norm; NaN if either holds one."""
    return _largest(a.double().cpu() - b.double().cpu())


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.cuda.set_device(int(sys.argv[1]))
    for check in run():
        print(json.dumps(asdict(check)), flush=True)
