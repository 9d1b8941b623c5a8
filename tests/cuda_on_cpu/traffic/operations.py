"""The operations whose traffic is counted, and the least that each can move.

The least that an operation can move: every 32-byte sector of its operands that holds an element on
which the result depends, read once, and every sector of the result, written once. Of dY those are
the sectors with an active channel, of a convolution's X the pixels that the kernel passes over (of
a depthwise one: in active channels), of the gradient all, zeros of frozen neurons included. What is
packed or summed in parts between two launches belongs to no operand, nor do the indices of the
active channels: they are moved, and not in the least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neq_kernels.backends import gpu_base
from neq_kernels.backends.problem import ConvGeometry
from tests.cuda_on_cpu.traffic.counted import (
    DTYPES,
    SECTOR,
    Moved,
    counted,
    counted_launcher,
    operators,
)

BF16, F32 = torch.bfloat16, torch.float32
OPERATIONS = (
    *("pack", "pack transposed", "linear few rows", "linear wide", "linear packed"),
    *("conv few rows", "conv by taps", "depthwise nhwc", "depthwise nchw"),
    *("finish", "scatter", "sgd", "adam"),
)
# Of a float64 result; what a kernel gets wrong at all is off by more.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Outcome:
    """Of one operation: its launches, the least that it can move, whether its result is right."""

    launches: Sequence[Moved]
    least_bytes: int
    is_right: bool


@dataclass(frozen=True)
class Case:
    """An operation on tensors of some shape, ``active`` of whose ``neurons`` are active. Of weight
    gradients: input channels of a neuron, and the sides of the kernel and of X."""

    operation: str
    shape: str
    dtype: torch.dtype
    active: int
    neurons: int
    run: Callable[[Case], Outcome]
    inputs: int = 0
    kernel: int = 1
    side: int = 1

    @property
    def order(self) -> Tensor:
        """Active neurons first, ascending; spread at random."""
        generator = torch.Generator().manual_seed(self.neurons + self.active)
        every = torch.randperm(self.neurons, generator=generator)
        parts = [self.active, self.neurons - self.active]
        return torch.cat([part.sort().values for part in every.split(parts)])

    @property
    def count(self) -> Tensor:
        return torch.tensor([self.active], dtype=torch.int32)

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(self.dtype)


def sectors(tensor: Tensor, needed: Callable[[Tensor], Tensor] = lambda offsets: offsets) -> int:
    """The 32-byte sectors that hold elements of ``tensor``: those that ``needed`` selects."""
    size = tensor.element_size()
    first = tensor.data_ptr() % SECTOR
    offsets = torch.arange(tensor.numel(), dtype=torch.int32)
    chosen = needed(offsets.as_strided(tensor.shape, tensor.stride()))
    return len(((chosen.flatten() * size + first) // SECTOR).unique())


def is_right(case: Case, grad: Tensor, exact: Tensor) -> bool:
    """Whether the active rows are ``exact``, and the frozen ones 0."""
    order, n = case.order, case.active
    off = (grad[order[:n]].double() - exact).abs().max()
    return bool(off <= TOLERANCE * exact.abs().max()) and not grad[order[n:]].any()


def cases() -> Iterator[Case]:
    """All operations."""
    for n in (256, 128, 51, 10):
        yield _pack(BF16, 4096, 512, n, transposed=False)
    yield _pack(BF16, 16384, 512, 256, transposed=False)
    for n in (256, 51):
        yield _pack(BF16, 4096, 512, n, transposed=True)
    for n in (1, 4, 8, 16):
        yield _linear("linear few rows", BF16, 16384, 512, 512, n)
    for t, c in ((8192, 1024), (16384, 64), (1024, 512)):
        yield _linear("linear few rows", BF16, t, 512, c, 8)
    # As long as in training: the sums in parts are few beside the operands.
    yield _linear("linear few rows", BF16, 131072, 512, 512, 8)
    yield _linear("linear wide", BF16, 8192, 512, 128, 32)
    yield _linear("linear wide", BF16, 4096, 512, 512, 32)
    yield _linear("linear packed", BF16, 4096, 512, 512, 64)
    yield _linear("linear packed", BF16, 2048, 512, 512, 256)
    for n in (1, 4, 16):
        yield _conv("conv few rows", BF16, (12, 256, 28, 32), 128, n)
    yield _conv("conv few rows", BF16, (12, 64, 28, 32), 64, 8)
    yield _conv("conv few rows", BF16, (64, 64, 28, 32), 64, 1)
    yield _conv("conv few rows", BF16, (12, 256, 14, 14), 256, 8)
    yield _conv("conv few rows", BF16, (256, 64, 56, 56), 64, 8)
    yield _conv("conv by taps", BF16, (12, 128, 28, 28), 256, 8, kernel=1)
    yield _conv("conv by taps", BF16, (6, 128, 28, 28), 256, 8, stride=2)
    yield _conv("conv by taps", BF16, (4, 64, 28, 28), 128, 32)
    yield _conv("conv by taps", BF16, (4, 64, 28, 28), 128, 64)
    for layout in ("nhwc", "nchw"):
        for n in (64, 32, 6):
            yield _depthwise(BF16, layout, (16, 64, 28, 28), 3, n)
        yield _depthwise(BF16, layout, (4, 64, 28, 28), 3, 32)
        yield _depthwise(BF16, layout, (128, 32, 28, 28), 3, 16)
        yield _depthwise(BF16, layout, (2, 64, 56, 56), 7, 32)
        yield _depthwise(BF16, layout, (8, 96, 14, 14), 5, 48)
        yield _depthwise(BF16, layout, (16, 96, 7, 7), 3, 48)
    for n in (256, 51):
        yield _pack(F32, 4096, 512, n, transposed=False)
    yield _linear("linear few rows", F32, 4096, 512, 256, 8)
    yield _conv("conv few rows", F32, (4, 64, 28, 32), 64, 8)
    for layout in ("nhwc", "nchw"):
        yield _depthwise(F32, layout, (16, 64, 28, 28), 3, 32)
        yield _depthwise(F32, layout, (8, 96, 14, 14), 5, 48)
    for dtype in (BF16, F32):
        for parts in (1, 16):
            yield _finish(dtype, 512, 1024, 64, parts)
        yield _scatter(dtype, 512, 1024, 64)
        for operation in ("sgd", "adam"):
            for n in (256, 51):
                yield _optimizer(operation, dtype, 512, 576, n)


def _pack(dtype: torch.dtype, t: int, k: int, n: int, transposed: bool) -> Case:
    def run(case: Case) -> Outcome:
        rows, order, count = case.random(t, k), case.order, case.count
        (packed, _), launches = counted(
            lambda: operators().pack(rows, order, count, n, transposed, False),
            {"rows": rows, "order": order, "count": count},
            {},
        )
        exact, active = rows[:, order[:n]], order[:n]
        written = (lambda o: o[:n, :t]) if transposed else (lambda o: o[:, :n])
        least = sectors(rows, lambda o: o[:, active]) + sectors(packed, written)
        got = packed[:n, :t].t() if transposed else packed[:, :n]
        return Outcome(launches, SECTOR * least, torch.equal(got, exact))

    return Case("pack transposed" if transposed else "pack", f"T={t}", dtype, n, k, run)


def _linear(operation: str, dtype: torch.dtype, t: int, k: int, c: int, n: int) -> Case:
    def run(case: Case) -> Outcome:
        dy, x, weight = case.random(t, k), case.random(t, c), torch.empty(k, c, dtype=dtype)
        order, count = case.order, case.count
        (grad, bias), launches = counted(
            lambda: operators().linear_wgrad(dy, x, weight, order, count, n, True),
            {"dy": dy, "x": x, "order": order, "count": count},
            {},
        )
        active = order[:n]
        read = sectors(dy, lambda o: o[:, active]) + sectors(x)
        exact = dy[:, active].double().t() @ x.double()
        least = SECTOR * (read + sectors(grad) + sectors(bias))
        return Outcome(launches, least, is_right(case, grad, exact))

    return Case(operation, f"T={t} C={c}", dtype, n, k, run, inputs=c)


def _images(case: Case, shape: Sequence[int], layout: str = "nhwc") -> Tensor:
    formats = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
    return case.random(*shape).contiguous(memory_format=formats[layout])


def _pixels(x: Tensor, out: Sequence[int], kernel: int, g: ConvGeometry) -> tuple[Tensor, Tensor]:
    """The rows and the columns of X that some tap reads."""
    found = []
    for size, outs, stride, padding in zip(x.shape[2:], out, g.stride, g.padding, strict=True):
        at = torch.arange(outs)[:, None] * stride - padding + torch.arange(kernel)
        found.append(at[(at >= 0) & (at < size)].unique())
    return found[0], found[1]


def _conv(
    operation: str,
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
    k: int,
    n: int,
    kernel: int = 3,
    stride: int = 1,
) -> Case:
    g = ConvGeometry((stride,) * 2, (kernel // 2,) * 2, (1, 1), False, (0, 0), 1)
    shape = f"{'x'.join(map(str, size))} {kernel}x{kernel}" + f"/{stride}" * (stride > 1)
    return Case(
        *(operation, shape, dtype, n, k, lambda case: _run_conv(case, "nhwc", size, kernel, g)),
        inputs=size[1],
        kernel=kernel,
        side=size[3],
    )


def _depthwise(
    dtype: torch.dtype, layout: str, size: tuple[int, int, int, int], kernel: int, n: int
) -> Case:
    g = ConvGeometry((1, 1), (kernel // 2,) * 2, (1, 1), False, (0, 0), size[1])
    shape = f"{'x'.join(map(str, size))} {kernel}x{kernel}"
    return Case(
        *(f"depthwise {layout}", shape, dtype, n, size[1]),
        lambda case: _run_conv(case, layout, size, kernel, g),
        inputs=1,
        kernel=kernel,
        side=size[3],
    )


def _run_conv(
    case: Case, layout: str, size: Sequence[int], kernel: int, g: ConvGeometry
) -> Outcome:
    is_depthwise, n, k = g.groups > 1, case.active, case.neurons
    out = [
        (side + 2 * p - kernel) // s + 1
        for side, p, s in zip(size[2:], g.padding, g.stride, strict=True)
    ]
    dy, x = _images(case, (size[0], k, *out), layout), _images(case, size, layout)
    like = torch.empty(k, size[1] // g.groups, kernel, kernel, dtype=case.dtype)
    weight = like.contiguous(memory_format=torch.channels_last) if not is_depthwise else like
    order, count = case.order, case.count
    operator = operators().depthwise_wgrad if is_depthwise else operators().conv_wgrad
    (grad, bias), launches = counted(
        lambda: operator(
            *(dy, x, weight, g.stride, g.padding, g.dilation, order, count, n, True),
        ),
        {"dy": dy, "x": x, "order": order, "count": count},
        {},
    )
    active, (rows, columns) = order[:n], _pixels(x, out, kernel, g)
    of_x = active if is_depthwise else torch.arange(size[1])
    least = sectors(dy, lambda o: o[:, active]) + sectors(grad) + sectors(bias)
    least += sectors(x, lambda o: o[:, of_x][:, :, rows][:, :, :, columns])
    _, exact, _ = g.backward(
        dy[:, active].double(),
        x[:, of_x].double(),
        like[:n].double(),
        (False, True, False),
        groups=n if is_depthwise else 1,
    )
    assert exact is not None
    return Outcome(launches, SECTOR * least, is_right(case, grad, exact))


def _finish(dtype: torch.dtype, k: int, c: int, n: int, number: int) -> Case:
    def run(case: Case) -> Outcome:
        parts = torch.randn(number, n, c, generator=torch.Generator().manual_seed(0))
        grad, order, count = torch.full((k, c), torch.nan, dtype=dtype), case.order, case.count
        launches = counted_launcher(
            {"parts": parts, "order": order, "count": count},
            {"grad": grad},
            *("neq_cuda_finish", 0, DTYPES[dtype], parts, None, order, count, grad, None),
            *(k, c, 1, c, number, 0, n, 1, None),
        )
        least = SECTOR * (sectors(parts) + sectors(grad))
        return Outcome(launches, least, is_right(case, grad, parts.double().sum(0)))

    return Case("finish", f"C={c} parts={number}", dtype, n, k, run)


def _scatter(dtype: torch.dtype, k: int, c: int, n: int) -> Case:
    def run(case: Case) -> Outcome:
        rows, like = case.random(n, c), torch.empty(k, c, dtype=dtype)
        order, count = case.order, case.count
        grad, launches = counted(
            lambda: operators().scatter_rows(rows, like, order, count),
            {"rows": rows, "order": order, "count": count},
            {},
        )
        least = SECTOR * (sectors(rows) + sectors(grad))
        return Outcome(launches, least, is_right(case, grad, rows.double()))

    return Case("scatter", f"C={c}", dtype, n, k, run)


def _optimizer(operation: str, dtype: torch.dtype, k: int, c: int, n: int) -> Case:
    """SGD with momentum: reads gradient, parameter and momentum, writes the last two; Adam has two
    moments, and a count of steps."""

    def run(case: Case) -> Outcome:
        order, active = case.order, case.order[:n]
        param, grad = torch.zeros(k, c, dtype=dtype), case.random(k, c)
        state = [torch.zeros(k, c, dtype=dtype) for _ in range(1 if operation == "sgd" else 2)]
        steps = torch.zeros(k, dtype=torch.int64)
        is_sgd = operation == "sgd"
        lists = [[param], [grad], *([s] for s in state), *([[]] if not is_sgd else [])]
        lists += [[] if is_sgd else [steps], [order]]
        blocks, addresses, shapes = gpu_base.tables(lists, [n], [1, 1, k, c])
        about = (param, addresses, shapes, 1, blocks)
        sgd_numbers = (0.1, 0.9, 0.0, 0.0, True, False, False)
        adam_numbers = (0.1, 0.9, 0.999, 1e-8, 0.0, False, False, False)
        numbers: tuple[float, ...] = sgd_numbers if is_sgd else adam_numbers
        step = operators().sgd_rows_ if is_sgd else operators().adam_rows_
        writes = {"param": param, **{f"state {i}": s for i, s in enumerate(state)}}
        if not is_sgd:
            writes["steps"] = steps
        reads = {"grad": grad, "order": order, "addresses": addresses, "shapes": shapes}
        _, launches = counted(lambda: step(*about, *numbers), reads, writes)
        least = sectors(grad, lambda o: o[active])
        least += sum(2 * sectors(t, lambda o: o[active]) for t in writes.values())
        moved = grad.double() if is_sgd else grad.double().sign()
        right = is_right(case, param, -0.1 * moved[active])
        return Outcome(launches, SECTOR * least, right)

    return Case(operation, f"C={c}", dtype, n, k, run)
