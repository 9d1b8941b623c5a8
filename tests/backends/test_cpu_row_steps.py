"""The C++ row steps against torch.optim and against the row steps in plain torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neq_kernels.channels import WHOLE_PARAMETER, NeuronLayout
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
from tests.support.row_functions import step_one

NAN = float("nan")
SGD = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.01,
    "nesterov": False,
    "maximize": False,
}
ADAM = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.02,
    "decoupled": False,
    "maximize": False,
}


@pytest.fixture(scope="module", autouse=True)
def _extension():
    assert cpu.unavailable() is None


layouts = st.sampled_from([NeuronLayout(), NeuronLayout(1, 1), NeuronLayout(3, 1), WHOLE_PARAMETER])
sgd_settings = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 1),
        "momentum": st.sampled_from([0.0, 0.9]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "weight_decay": st.sampled_from([0.0, 0.01]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
    }
)
adam_settings = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 0.1),
        "beta1": st.sampled_from([0.0, 0.4, 0.9]),
        "beta2": st.sampled_from([0.3, 0.99]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.02]),
        "decoupled": st.booleans(),
        "maximize": st.booleans(),
    }
)


class Case:
    """A parameter with its gradient and states, all with the same strides."""

    def __init__(self, shape, layout, kind, n, seed, dtype=torch.float64):
        self.layout, self.n = layout, n
        make = lambda i: arranged(random(shape, seed + i, dtype), kind)  # noqa: E731
        self.param, self.grad, self.first = make(0), make(1), make(2)
        self.second, self.largest = make(3).abs(), make(4).abs()
        k = layout.n_neurons(self.param)
        self.n = min(n, k)
        self.order = order_of(k, self.n, seed)
        self.steps = (random((k,), seed).abs().long() % 3) * 5

    def copy(self, dtype=None):
        twin = object.__new__(Case)
        twin.__dict__.update(
            {
                name: value.to(dtype or value.dtype, copy=True)
                if isinstance(value, torch.Tensor) and value.is_floating_point()
                else value.clone()
                if isinstance(value, torch.Tensor)
                else value
                for name, value in vars(self).items()
            }
        )
        return twin

    def sgd(self, module, *, with_steps=True, **settings):
        with_momentum = settings["momentum"] != 0
        state = (
            self.first if with_momentum else None,
            self.steps if with_steps and with_momentum else None,
        )
        self._step(module, "sgd_rows_", state, settings)

    def adam(self, module, *, amsgrad, **settings):
        state = (self.first, self.second, self.largest if amsgrad else None, self.steps)
        self._step(module, "adam_rows_", state, settings)

    def _step(self, module, function, state, settings):
        where = (self.order, self.n, self.layout)
        step_one(module, function, self.param, self.grad, state, *where, **settings)

    @property
    def tensors(self):
        return (self.param, self.first, self.second, self.largest)


def assert_same_step(case, step):
    """In the case's dtype and in float64: `step(case, module)` is the plain step's equal, and
    leaves the frozen neurons alone."""
    ours, torchs, exact = case.copy(), case.copy(), case.copy(torch.float64)
    step(ours, cpu)
    step(torchs, None)
    step(exact, None)
    assert torch.equal(ours.steps, exact.steps)
    for before, mine, theirs, wanted in zip(
        case.tensors, ours.tensors, torchs.tensors, exact.tensors, strict=True
    ):
        assert_as_precise_as_torch(mine, theirs, wanted)
        if case.n < len(case.order):
            frozen = case.order[case.n :]
            kept = bits(case.layout.gather(before, frozen))
            assert torch.equal(bits(case.layout.gather(mine, frozen)), kept)


shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5)
kinds = st.sampled_from(("contiguous", "channels_last"))


@given(shapes, layouts, kinds, st.integers(0, 20), seeds, st.sampled_from(FLOATING), st.booleans(),
       sgd_settings)  # fmt: skip
def test_sgd_rows(shape, layout, kind, n, seed, dtype, with_steps, settings):
    shape[0] *= layout.groups
    case = Case(tuple(shape), layout, kind, n, seed, dtype)
    assert_same_step(case, lambda c, module: c.sgd(module, with_steps=with_steps, **settings))


@given(shapes, layouts, kinds, st.integers(0, 20), seeds, st.sampled_from(FLOATING), st.booleans(),
       adam_settings)  # fmt: skip
def test_adam_rows(shape, layout, kind, n, seed, dtype, amsgrad, settings):
    shape[0] *= layout.groups
    case = Case(tuple(shape), layout, kind, n, seed, dtype)
    assert_same_step(case, lambda c, module: c.adam(module, amsgrad=amsgrad, **settings))


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.7])
def test_the_first_moment_is_as_precise_as_torchs_whatever_its_share(beta1):
    for seed in range(10):
        case = Case((1, 4), NeuronLayout(), "contiguous", 1, seed, torch.float32)
        settings = {**ADAM, "beta1": beta1}
        assert_same_step(case, lambda c, module, s=settings: c.adam(module, amsgrad=False, **s))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.4])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_rows_with_all_active_is_torchs_sgd(nesterov, dampening, maximize):
    if nesterov and dampening:
        dampening = 0.0
    settings = {**SGD, "nesterov": nesterov, "dampening": dampening, "maximize": maximize}
    case = Case((6, 5, 3), NeuronLayout(), "contiguous", 6, 0)
    case.steps.zero_()
    param = torch.nn.Parameter(case.param.clone())
    theirs = torch.optim.SGD([param], foreach=False, **settings)
    for i in range(4):
        param.grad = random((6, 5, 3), 10 + i)
        case.grad = param.grad.clone()
        theirs.step()
        case.sgd(cpu, **settings)
        torch.testing.assert_close(case.param, param.data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_rows_with_all_active_is_torchs_adam(optimizer, amsgrad):
    decoupled = optimizer is torch.optim.AdamW
    case = Case((6, 5, 3), NeuronLayout(), "contiguous", 6, 0)
    for state in (case.steps, case.first, case.second, case.largest):
        state.zero_()
    param = torch.nn.Parameter(case.param.clone())
    theirs = optimizer(
        [param], lr=0.01, betas=(0.9, 0.99), weight_decay=0.02, amsgrad=amsgrad, foreach=False
    )
    for i in range(4):
        param.grad = random((6, 5, 3), 10 + i)
        case.grad = param.grad.clone()
        theirs.step()
        case.adam(cpu, amsgrad=amsgrad, **{**ADAM, "decoupled": decoupled})
        torch.testing.assert_close(case.param, param.data, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [NeuronLayout(), NeuronLayout(1, 1), NeuronLayout(2, 1)])
@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_rows_larger_than_one_piece_on_any_number_of_threads(layout, kind):
    case = Case((40, 24, 9, 11), layout, kind, 13, 0, torch.float32)
    wide = Case((3, 70_001), NeuronLayout(), "contiguous", 2, 0, torch.float32)
    for each in (case, wide):
        results = []
        for n_threads in (1, 2):
            one, two = each.copy(), each.copy()
            with threads(n_threads):
                one.sgd(cpu, **SGD)
                two.adam(cpu, amsgrad=True, **ADAM)
            results.append([bits(t) for t in (*one.tensors, *two.tensors)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert_same_step(each, lambda c, module: c.adam(module, amsgrad=False, **ADAM))


def test_nan_in_frozen_neurons_stays_there():
    case = Case((9, 7, 3, 3), NeuronLayout(), "channels_last", 4, 0)
    frozen, active = case.order[4:], case.order[:4]
    for tensor in (case.param, case.grad, *case.tensors):
        tensor[frozen] = NAN
    case.sgd(cpu, **SGD)
    case.adam(cpu, amsgrad=True, **ADAM)
    for tensor in case.tensors:
        assert tensor[active].isfinite().all()
        assert tensor[frozen].isnan().all()


def test_first_step_of_a_neuron_ignores_what_its_buffer_held():
    case = Case((5, 3), NeuronLayout(), "contiguous", 5, 0)
    case.steps.copy_(torch.tensor([0, 1, 0, 2, 3]))
    case.first[case.steps == 0] = NAN
    assert_same_step(case, lambda c, module: c.sgd(module, **{**SGD, "dampening": 0.5}))
    case.sgd(cpu, **SGD)
    assert case.first.isfinite().all()
    assert case.steps.tolist() == [1, 2, 1, 3, 4]


def test_a_step_makes_saved_tensors_stale():
    case = Case((5, 3), NeuronLayout(), "contiguous", 5, 0)
    weight = case.param.requires_grad_()
    loss = (weight * weight).sum()
    with torch.no_grad():
        case.sgd(cpu, **SGD)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def broken(name, value):
    def change(case):
        setattr(case, name, value(getattr(case, name)))

    return change


BAD = [
    (broken("grad", lambda t: t.float()), "grad: expected dtype Double, got Float"),
    (broken("grad", lambda t: t[:, :2]), "grad: expected shape"),
    (broken("grad", lambda t: arranged(t, "channels_last")), "grad: expected the strides of param"),
    (broken("first", lambda t: t.half()), "expected dtype Double, got Half"),
    (broken("steps", lambda t: t.float()), "steps: expected a contiguous int64 vector of length 5"),
    (broken("steps", lambda t: t[:4]), "steps: expected a contiguous int64 vector of length 5"),
    (broken("order", lambda t: t.int()), "order: expected dtype Long, got Int"),
    (broken("order", lambda t: t * 0 + 1), "order: expected no duplicates, got 1 twice"),
    (broken("order", lambda t: t + 1), "order: expected 0 <= index < 5, got 5"),
    (broken("n", lambda n: 6), "n: expected 0 <= n <= 5, got 6"),
    (broken("param", lambda t: arranged(t, "every_other")), "param: expected a dense tensor"),
    (broken("param", lambda t: t.long()), "param: expected float32"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_refused_and_nothing_is_written(change, message):
    case = Case((5, 4, 3, 2), NeuronLayout(), "contiguous", 5, 0)
    case.order = torch.arange(5)
    change(case)
    before = case.copy()
    for step in (lambda: case.sgd(cpu, **SGD), lambda: case.adam(cpu, amsgrad=True, **ADAM)):
        with pytest.raises(ValueError, match=message):
            step()
        for name, value in vars(before).items():
            now = getattr(case, name)
            assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value


def test_momentum_needs_a_buffer_and_lr_a_number():
    case = Case((5, 4), NeuronLayout(), "contiguous", 5, 0)
    arguments = ([case.param], [case.grad], [], [], [case.order], [5], [1, 1, 5, 4])
    with pytest.raises(ValueError, match="momentum_buffers: expected 1, got 0"):
        cpu.sgd_rows_(*arguments, **SGD)
    with pytest.raises(ValueError, match="lr: expected a finite number, got nan"):
        cpu.sgd_rows_(*arguments, **{**SGD, "momentum": 0.0, "lr": NAN})


def many(dtype=torch.float32):
    """Parameters of every layout and of very different sizes."""
    sizes = [
        ((9,), NeuronLayout(), "contiguous", 4),
        ((3, 70_001), NeuronLayout(), "contiguous", 2),
        ((6, 5, 3, 3), NeuronLayout(), "channels_last", 6),
        ((7, 2), NeuronLayout(), "contiguous", 0),
        ((12, 10, 9, 11), NeuronLayout(3, 1), "contiguous", 13),
        ((0, 4), NeuronLayout(1, 1), "contiguous", 3),
        ((40, 24, 9, 11), NeuronLayout(1, 1), "channels_last", 7),
        ((5, 7), WHOLE_PARAMETER, "contiguous", 1),
        ((400, 3), NeuronLayout(), "contiguous", 200),
    ]
    return [Case(shape, layout, kind, n, i, dtype) for i, (shape, layout, kind, n) in
            enumerate(sizes)]  # fmt: skip


def lists_of(cases, *names):
    return [[getattr(case, name) for case in cases] for name in names]


def step_together(cases, function, settings):
    names = {"sgd_rows_": ("first",), "adam_rows_": ("first", "second", "largest")}[function]
    blocks = [i for case in cases for i in case.layout.blocks(case.param)]
    lists = lists_of(cases, "param", "grad", *names, "steps", "order", "n")
    getattr(cpu, function)(*lists, blocks, **settings)


FUNCTIONS = [("sgd_rows_", {**SGD, "dampening": 0.3}), ("adam_rows_", ADAM)]


@pytest.mark.parametrize(("function", "settings"), FUNCTIONS)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_many_parameters_in_one_call_as_one_by_one(function, settings, n_threads):
    together, alone = many(), many()
    with threads(n_threads):
        step_together(together, function, settings)
    for case in alone:
        step_together([case], function, settings)
    for case, expected in zip(together, alone, strict=True):
        assert torch.equal(case.steps, expected.steps)
        assert all(map(torch.equal, map(bits, case.tensors), map(bits, expected.tensors)))


@pytest.mark.parametrize(("function", "settings"), FUNCTIONS)
def test_one_bad_parameter_among_many_and_nothing_is_written(function, settings):
    for change, _ in BAD:
        cases = [*many(torch.float64), Case((5, 4, 3, 2), NeuronLayout(), "contiguous", 5, 9)]
        cases[-1].order = torch.arange(5)
        change(cases[-1])
        before = [case.copy() for case in cases]
        with pytest.raises((ValueError, TypeError)):
            step_together(cases, function, settings)
        for case, old in zip(cases, before, strict=True):
            assert torch.equal(case.steps, old.steps)
            assert all(map(torch.equal, map(bits, case.tensors), map(bits, old.tensors)))


@pytest.mark.parametrize("position", range(7))
def test_lists_of_different_lengths_are_refused(position):
    case = Case((5, 4), NeuronLayout(), "contiguous", 5, 0)
    lists = [*lists_of([case, case], "param", "grad", "first", "steps", "order", "n")]
    lists.append([1, 1, 5, 4, 1, 1, 5, 4])
    lists[position] = lists[position][:1]
    with pytest.raises(ValueError, match=r"expected \d+, got \d+"):
        cpu.sgd_rows_(*lists, **SGD)
