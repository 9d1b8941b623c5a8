"""The direct depthwise wgrad in C++ against float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.arrange import (
    FLOATING,
    arranged,
    assert_as_precise_as_torch,
    bits,
    order_of,
    random,
    seeds,
    threads,
)
from tests.support.backends import cpu

NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def _extension():
    assert cpu.unavailable() is None


@dataclass
class Depthwise:
    images: int = 2
    channels: int = 8
    multiplier: int = 1
    size: tuple[int, int] = (9, 8)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def k(self):
        return self.channels * self.multiplier

    @property
    def weight_shape(self):
        return (self.k, 1, *self.kernel)

    def output_size(self):
        return tuple(
            (h + 2 * p - d * (k - 1) - 1) // s + 1 if h + 2 * p > d * (k - 1) else 0
            for h, k, s, p, d in zip(
                self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def tensors(self, dtype, seed, kind="contiguous", grad_kind=None):
        grad = random((self.images, self.k, *self.output_size()), seed, dtype)
        x = random((self.images, self.channels, *self.size), seed + 1, dtype)
        return arranged(grad, grad_kind or kind, seed), arranged(x, kind, seed)

    def dense(self, grad, x):
        """All rows by PyTorch, in the tensors' own dtype."""
        _, weight, bias = torch.ops.aten.convolution_backward(
            grad,
            x,
            x.new_empty(self.weight_shape),
            [self.k],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.channels,
            [False, True, True],
        )
        return weight, bias

    def oracle(self, grad, x):
        """All rows in float64, as a product with the unfolded input."""
        columns = F.unfold(x.double(), self.kernel, self.dilation, self.padding, self.stride)
        columns = columns.reshape(self.images, self.channels, -1, columns.shape[-1])
        columns = columns.repeat_interleave(self.multiplier, dim=1)
        grad = grad.double().flatten(2)
        weight = torch.einsum("nctl,ncl->ct", columns, grad)
        return weight.reshape(self.weight_shape), grad.sum((0, 2))

    def ours(self, grad, x, order, n, want_bias=True):
        return cpu.depthwise_wgrad(
            grad,
            x,
            self.weight_shape,
            self.stride,
            self.padding,
            self.dilation,
            order,
            n,
            want_bias,
        )

    def check(self, grad, x, order, n):
        rows, bias = self.ours(grad, x, order, n)
        assert rows.dtype == bias.dtype == x.dtype
        exact = self.oracle(grad, x)
        magnitudes = self.oracle(grad.abs(), x.abs())
        torchs = self.dense(grad, x)
        for mine, theirs, wanted, terms in zip(
            (rows, bias), torchs, exact, magnitudes, strict=True
        ):
            active = order[:n]
            largest = float(terms.max()) if terms.numel() else 0.0
            assert_as_precise_as_torch(mine, theirs[active], wanted[active], largest)
        return rows, bias


pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
problems = st.builds(
    Depthwise,
    images=st.integers(1, 3),
    channels=st.integers(1, 20),
    multiplier=st.integers(1, 2),
    size=pairs(1, 19),
    kernel=pairs(1, 5),
    stride=pairs(1, 3),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
)
kinds = st.sampled_from(("contiguous", "channels_last", "every_other", "permuted"))


@given(problems, st.data(), kinds, kinds, st.sampled_from(FLOATING), seeds)
def test_depthwise_wgrad(problem, data, kind, grad_kind, dtype, seed):
    assume(min(problem.output_size()) > 0)
    n = data.draw(st.integers(0, problem.k))
    grad, x = problem.tensors(dtype, seed, kind, grad_kind)
    problem.check(grad, x, order_of(problem.k, n, seed), n)


LARGE = [
    Depthwise(3, 40, 1, (57, 60), (3, 3)),
    Depthwise(2, 70, 1, (14, 14), (7, 7), padding=(3, 3)),
    Depthwise(2, 33, 1, (30, 41), (5, 3), stride=(2, 3), padding=(2, 0), dilation=(1, 2)),
    Depthwise(1, 3, 2, (230, 190), (3, 3), stride=(2, 2)),
    Depthwise(65, 17, 1, (7, 7), (5, 5), padding=(2, 2)),
]


@pytest.mark.parametrize("problem", LARGE)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_several_bands_chunks_and_threads(problem, kind, share):
    n = max(1, round(share * problem.k))
    order = order_of(problem.k, n, 0)
    grad, x = problem.tensors(torch.float32, 0, kind)
    with threads(1):
        one_thread = problem.check(grad, x, order, n)
    with threads(2):
        two_threads = problem.ours(grad, x, order, n)
    for one, two in zip(one_thread, two_threads, strict=True):
        assert torch.equal(bits(one), bits(two))


# Read in place, or gathered where few channels are active.
CHANNELS_LAST = [
    *(Depthwise(channels=channels) for channels in (*range(1, 10), 15, 16, 17, 23, 31, 33)),
    Depthwise(channels=17, size=(1, 1)),
    Depthwise(channels=9, size=(1, 1), kernel=(7, 7), padding=(3, 3)),
    Depthwise(channels=11, size=(4, 4), kernel=(7, 7), padding=(3, 3)),
    Depthwise(channels=19, size=(5, 6), kernel=(2, 3), padding=(4, 7)),
    Depthwise(channels=19, size=(3, 2), kernel=(3, 3), padding=(5, 4), dilation=(3, 2)),
    Depthwise(channels=12, size=(16, 15), kernel=(5, 5), stride=(2, 2), padding=(2, 2)),
    Depthwise(channels=10, size=(12, 13), kernel=(4, 6), stride=(3, 1), padding=(1, 2)),
    Depthwise(channels=20, size=(20, 23), kernel=(11, 9), padding=(5, 4)),
    Depthwise(channels=9, size=(9, 24), kernel=(2, 15), padding=(0, 7), dilation=(2, 1)),
    Depthwise(channels=13, size=(3, 300), kernel=(3, 3), padding=(1, 2)),
    Depthwise(channels=8, size=(70, 65), kernel=(1, 1), padding=(0, 0)),
]


@pytest.mark.parametrize("problem", CHANNELS_LAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last_with_few_and_many_active(problem, dtype):
    grad, x = problem.tensors(dtype, 1, "channels_last")
    k = problem.k
    for n in sorted({1, (k + 1) // 2, k}):
        problem.check(grad, x, order_of(k, n, n), n)
    problem.check(grad, x, torch.randperm(k), k)


def test_infinity_at_the_edge_does_not_meet_the_padding():
    problem = Depthwise(channels=16)
    grad, x = problem.tensors(torch.float32, 0, "channels_last")
    grad[0, 5, 0, 0] = float("inf")
    rows, _ = problem.ours(grad, x, torch.arange(16), 16)
    assert rows[5, 0, 0].isfinite().all()
    assert rows[5, 0, :, 0].isfinite().all()
    assert rows[5, 0, 1:, 1:].isinf().all()
    assert rows[[*range(5), *range(6, 16)]].isfinite().all()


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_frozen_channels_is_never_read(kind, dtype):
    problem = Depthwise(channels=37)
    order = order_of(37, 19, 4)
    grad, x = problem.tensors(dtype, 0, kind)
    clean = problem.ours(grad, x, order, 19)
    grad[:, order[19:]] = NAN
    x[:, order[19:]] = float("inf")
    for mine, wanted in zip(problem.ours(grad, x, order, 19), clean, strict=True):
        assert torch.equal(bits(mine), bits(wanted))


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_nan_in_an_active_channel_shows_up(kind):
    problem = Depthwise(channels=20)
    grad, x = problem.tensors(torch.float32, 0, kind)
    grad[1, 7, 2, 2] = NAN
    rows, bias = problem.ours(grad, x, torch.arange(20), 20)
    assert rows[7].isnan().all()
    assert bias[7].isnan()
    assert int(rows.isnan().sum()) == 9
    assert int(bias.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("problem", "unread_rows", "unread_columns"),
    [
        (
            Depthwise(size=(8, 10), kernel=(1, 2), stride=(3, 3), padding=(0, 0)),
            [1, 2, 4, 5, 7],
            [2, 5, 8, 9],
        ),
        (Depthwise(size=(8, 8), kernel=(3, 3), stride=(2, 2), padding=(0, 0)), [7], [7]),
        (Depthwise(size=(9, 9), kernel=(2, 2), stride=(4, 4), dilation=(2, 2)), [0, 2, 8], [8]),
    ],
)
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_input_that_no_output_depends_on_is_never_read(problem, unread_rows, unread_columns, kind):
    grad, x = problem.tensors(torch.float32, 0, kind)
    clean = problem.ours(grad, x, torch.arange(8), 8)
    x[:, :, unread_rows] = NAN
    x[:, :, :, unread_columns] = NAN
    for mine, wanted in zip(problem.ours(grad, x, torch.arange(8), 8), clean, strict=True):
        assert torch.equal(bits(mine), bits(wanted))


@pytest.mark.parametrize(("images", "n"), [(0, 3), (2, 0)])
def test_empty_batch_and_no_active_channel(images, n):
    problem = Depthwise(images=images)
    grad, x = problem.tensors(torch.float32, 0)
    rows, bias = problem.ours(grad, x, order_of(8, n, 0), n)
    assert rows.shape == (n, 1, 3, 3)
    assert bias.shape == (n,)
    assert (rows == 0).all()
    assert (bias == 0).all()


def test_bias_is_left_out_unless_wanted():
    problem = Depthwise()
    grad, x = problem.tensors(torch.float32, 0)
    rows, bias = problem.ours(grad, x, torch.arange(8), 8, want_bias=False)
    assert bias.numel() == 0
    assert torch.equal(rows, problem.ours(grad, x, torch.arange(8), 8)[0])


BAD = [
    ({"order": torch.tensor([8])}, "order: expected 0 <= index < 8, got 8"),
    ({"order": torch.tensor([-1])}, "order: expected 0 <= index < 8, got -1"),
    ({"n": 2}, "n: expected 0 <= n <= 1, got 2"),
    ({"grad_output": torch.zeros(2, 8, 9, 8, dtype=torch.float64)}, "expected dtype Float"),
    ({"grad_output": torch.zeros(2, 8, 9, 9)}, "grad_output: expected size 8 in dimension 3"),
    ({"grad_output": torch.zeros(3, 8, 9, 8)}, "grad_output: expected batch 2, got 3"),
    ({"grad_output": torch.zeros(2, 9, 9, 8)}, "weight: expected"),
    ({"input": torch.zeros(8, 9, 8)}, "expected 4 dimensions"),
    ({"weight_shape": (8, 2, 3, 3)}, "weight: expected"),
    ({"weight_shape": (8, 1, 3)}, "expected 4 dimensions"),
    ({"weight_shape": (8, 1, 0, 3)}, "expected at least 1"),
    ({"stride": (0, 1)}, "expected at least 1"),
    ({"stride": (1,)}, "expected 2 values each"),
    ({"padding": (-1, 1)}, "expected at least 1, and padding at least 0"),
    ({"dilation": (1, 0)}, "expected at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments_are_refused(changes, message):
    arguments = {
        "grad_output": torch.zeros(2, 8, 9, 8),
        "input": torch.zeros(2, 8, 9, 8),
        "weight_shape": (8, 1, 3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "order": torch.tensor([0]),
        "n": 1,
        "want_bias": True,
    }
    cpu.depthwise_wgrad(**arguments)
    with pytest.raises(ValueError, match=message):
        cpu.depthwise_wgrad(**{**arguments, **changes})


def test_integers_are_refused():
    problem = Depthwise()
    grad, x = problem.tensors(torch.int64, 0)
    with pytest.raises(ValueError, match="input: expected float32"):
        problem.ours(grad, x, torch.arange(8), 8)
