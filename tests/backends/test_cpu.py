"""The C++ extension: loading, pack and scatter_rows against plain torch."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neq_kernels.backends import cpu as module
from neq_kernels.channels import WHOLE_PARAMETER, NeuronLayout
from tests.support.arrange import (
    ANY,
    DENSE,
    FLOATING,
    arranged,
    bits,
    order_of,
    random,
    seeds,
    threads,
)
from tests.support.backends import cpu

NAN = float("nan")
CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")
ALL_DTYPES = (*FLOATING, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex128)
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)


@pytest.fixture(scope="module", autouse=True)
def _extension():
    assert cpu.unavailable() is None


# --- loading -------------------------------------------------------------------------------------


def test_library_that_is_missing_or_broken_gives_the_reason(tmp_path, monkeypatch):
    missing = tmp_path / "no_such_library.so"
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for path in (missing, broken):
        monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, str(path))
        reason = module._load.__wrapped__()
        assert reason.startswith("the C++ extension cannot be loaded")
        assert path.name in reason


def test_extension_that_was_not_built_is_reported(monkeypatch, tmp_path):
    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(module, "_LIBRARY", tmp_path / "_C.so")
    assert module._load.__wrapped__() == (
        "the C++ extension was not built when neq_kernels was installed"
    )


def run_python(*arguments, capability):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "NEQ_KERNELS_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )


def test_instruction_set_must_be_one_that_exists():
    code = "from tests.support.backends import cpu; cpu.unavailable(); print(cpu.capability())"
    result = run_python("-c", code, capability="sse9")
    assert "expected default, avx2, avx512 or avx512_bf16, got sse9" in result.stderr


def test_portable_kernels_agree_with_the_oracles_too():
    if cpu.capability() == "default":
        return  # Every other test in this run shows it.
    result = run_python(
        *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/backends"),
        *("-k", "test_cpu and not portable and not instruction_set and not several_bands"),
        capability="default",
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_instruction_sets_below_the_best_agree_with_the_oracles_too():
    """In bfloat16, which each of them computes in its own way."""
    for capability in CAPABILITIES[1 : CAPABILITIES.index(cpu.capability())]:
        result = run_python(
            *("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "bfloat16"),
            "tests/backends/test_cpu_direct.py",
            capability=capability,
        )
        assert result.returncode == 0, result.stdout + result.stderr


# --- pack ----------------------------------------------------------------------------------------


@given(
    shapes,
    st.data(),
    st.sampled_from(ANY),
    st.sampled_from(ALL_DTYPES),
    st.booleans(),
    seeds,
)
def test_pack_is_index_select(shape, data, kind, dtype, any_order, seed):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    k = shape[dim]
    n = data.draw(st.integers(0, k))
    t = random(shape, seed).to(dtype)
    t = arranged(t, kind if dtype in FLOATING or kind != "every_other" else "permuted", seed)
    order = order_of(k, n, seed)
    if any_order and k:
        order = torch.randint(k, (n,))
    packed = cpu.pack(t, order, n, dim)
    assert packed.dtype == dtype
    assert torch.equal(packed, t.index_select(dim, order[:n]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 9, 64, 257])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 1.0])
def test_pack_of_columns(dtype, width, share):
    t = random((301, width), 1, dtype)
    n = max(1, round(share * width))
    order = order_of(width, n, seed=width)
    for n_threads in (1, 2):
        with threads(n_threads):
            assert torch.equal(cpu.pack(t, order, n, 1), t.index_select(1, order[:n]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pack_of_columns_in_no_order(dtype):
    # The address sanitizer watches the last column: nothing beyond it may be read.
    for order in ([8, *range(8)], [8, 0, 1, 2, 3], [8, 7, 8, 0, 8, 8, 3], [5, 5, 0, 8]):
        t = random((40, 9), 1, dtype)
        columns = torch.tensor(order)
        assert torch.equal(cpu.pack(t, columns, len(order), 1), t.index_select(1, columns))


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("shape", [(3, 8, 5, 4), (3, 8, 2, 5, 4), (3, 8, 4), (1, 8, 5, 4)])
def test_pack_keeps_the_memory_format(kind, shape):
    t = arranged(random(shape, 0), kind, seed=5)
    packed = cpu.pack(t, order_of(8, 5, 0), 5, 1)
    wide = [d for d in range(len(shape)) if shape[d] > 1]
    by_stride = sorted(wide, key=t.stride, reverse=True)
    assert sorted(wide, key=packed.stride, reverse=True) == by_stride
    assert packed.permute(sorted(range(len(shape)), key=t.stride, reverse=True)).is_contiguous()


def test_pack_of_channels_last_with_one_pixel_stays_channels_last():
    t = random((4, 8, 1, 1), 0).to(memory_format=torch.channels_last)
    assert cpu.pack(t, order_of(8, 3, 0), 3, 1).stride() == (3, 1, 3, 3)


@pytest.mark.parametrize("kind", DENSE)
def test_pack_never_reads_frozen_channels_into_active_ones(kind):
    t = arranged(random((5, 33, 3, 3), 0, torch.float32), kind)
    order = order_of(33, 17, 1)
    expected = t.index_select(1, order[:17])
    t[:, order[17:]] = NAN
    assert torch.equal(cpu.pack(t, order, 17, 1), expected)


@pytest.mark.parametrize(
    ("order", "n", "dim", "message"),
    [
        (torch.tensor([0, 4]), 2, 1, "expected 0 <= index < 4, got 4"),
        (torch.tensor([0, -1]), 2, 1, "expected 0 <= index < 4, got -1"),
        (torch.tensor([0, 1]), 3, 1, "n: expected 0 <= n <= 2, got 3"),
        (torch.tensor([0, 1]), -1, 1, "n: expected 0 <= n <= 2, got -1"),
        (torch.tensor([0, 1], dtype=torch.int32), 2, 1, "order: expected dtype Long"),
        (torch.tensor([[0, 1]]), 2, 1, "order: expected a contiguous vector"),
        (torch.arange(4)[::2], 2, 1, "order: expected a contiguous vector"),
        (torch.tensor([0, 1]), 2, 2, "dim: expected -2 <= dim < 2, got 2"),
        (torch.tensor([0, 1]), 2, -3, "dim: expected -2 <= dim < 2, got -3"),
    ],
)
def test_pack_refuses_bad_arguments(order, n, dim, message):
    with pytest.raises(ValueError, match=message):
        cpu.pack(torch.zeros(3, 4), order, n, dim)


def test_pack_reads_only_the_first_n_indices():
    t = random((3, 4), 0)
    assert torch.equal(cpu.pack(t, torch.tensor([2, 99]), 1, 1), t[:, 2:3])


# --- scatter_rows --------------------------------------------------------------------------------

layouts = st.sampled_from(
    [NeuronLayout(), NeuronLayout(1, 1), NeuronLayout(2, 1), NeuronLayout(3, 1), WHOLE_PARAMETER]
)


def rows_as(layout, tensor, neurons):
    """The rows in the shape that scatter_rows takes."""
    rows = layout.gather(tensor, neurons)
    if layout.axis is None:
        return rows[0] if len(neurons) else rows
    return rows.movedim(0, layout.axis) if layout.groups == 1 else rows


@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    layouts,
    st.data(),
    st.sampled_from(("contiguous", "channels_last", "permuted")),
    st.sampled_from(DENSE),
    st.sampled_from(FLOATING),
    st.sampled_from(FLOATING),
    seeds,
)
def test_scatter_rows(shape, layout, data, kind, rows_kind, dtype, rows_dtype, seed):
    shape[0] *= layout.groups
    like = arranged(random(tuple(shape), seed, dtype), kind, seed)
    k = layout.n_neurons(like)
    n = data.draw(st.integers(0, k))
    order = order_of(k, n, seed)
    values = random(tuple(shape), seed + 1, rows_dtype)
    expected = torch.zeros_like(like)
    if n:
        layout.scatter_(expected, order[:n], layout.gather(values, order[:n]).to(dtype))
    rows = arranged(rows_as(layout, values, order[:n]), rows_kind, seed + 2)
    scattered = cpu.scatter_rows(rows, like, order, n, layout)
    assert scattered.dtype == dtype
    assert scattered.stride() == like.stride()
    assert torch.equal(bits(scattered), bits(expected))


def test_scatter_rows_of_a_vector_and_of_nothing():
    order = order_of(6, 4, 3)
    bias = cpu.scatter_rows(random((4,), 0), torch.empty(6), order, 4, NeuronLayout())
    assert torch.equal(bias[order[:4]], random((4,), 0).float())
    assert (bias[order[4:]] == 0).all()
    empty = cpu.scatter_rows(torch.ones(4, 0), torch.empty(6, 0), order, 4, NeuronLayout())
    assert empty.shape == (6, 0)


@pytest.mark.parametrize(
    ("rows", "order", "n", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1, 1, 2]), 2, "every neuron once, got 1 twice"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2, 4]), 2, "expected 0 <= index < 4, got 4"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), 2, "order: expected length 4, got 3"),
        (torch.zeros(3, 3), torch.arange(4), 2, "rows: expected 2 neurons of 3 elements"),
        (torch.zeros(2, 3, 1), torch.arange(4), 2, "rows: expected 2 dimensions"),
        (torch.zeros(3, 2), torch.arange(4), 2, "rows: expected the shape of like"),
        (torch.zeros(2, 3), torch.arange(4), 5, "n: expected 0 <= n <= 4, got 5"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.arange(4), 2, "rows: expected float32"),
    ],
)
def test_scatter_rows_refuses_bad_arguments(rows, order, n, message):
    with pytest.raises(ValueError, match=message):
        cpu.scatter_rows(rows, torch.zeros(4, 3), order, n, NeuronLayout())


def test_scatter_rows_refuses_blocks_that_do_not_describe_the_tensor():
    op = torch.ops.neq_kernels_cpu.scatter_rows
    with pytest.raises(ValueError, match="like: expected blocks of 12 elements"):
        op(torch.zeros(4, 3), torch.zeros(4, 3), torch.arange(4), 4, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="like: expected a dense tensor"):
        op(torch.zeros(4, 3), torch.zeros(4, 6)[:, ::2], torch.arange(4), 4, 1, 1, 4, 3)
