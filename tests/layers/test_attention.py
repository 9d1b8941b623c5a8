"""Multi-head attention with neurons: PyTorch's own, bit for bit, and gradients of active rows."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import neq_kernels as neq
from neq_kernels.layers.attention import MultiheadAttention
from neq_kernels.layers.traversal import neuron_owners
from tests.support import oracle
from tests.support.models import assert_model_gradients

E, HEADS, LENGTH, SOURCES, BATCH = 8, 2, 5, 7, 3
MODULES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True},
    "dropout": {"dropout": 0.3},
    "kdim": {"kdim": 6, "vdim": 10},
    "kdim, no bias": {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
}
MASKS = ("none", "bool", "float", "per head", "padding", "both", "causal")
ROWS = {
    "all": (range(3 * E), range(E)),
    "some": ([1, 9, 10, 20], [3]),
    "queries": ([1, 2], range(E)),
    "none": ([], []),
}


def inputs(options, kind, dtype=torch.float64):
    """Query, key and value: of one tensor ("self"), two ("memory") or three ("three")."""
    torch.manual_seed(1)
    query = torch.randn(LENGTH, BATCH, E, dtype=dtype)
    key = torch.randn(SOURCES, BATCH, options.get("kdim", E), dtype=dtype)
    value = torch.randn(SOURCES, BATCH, options.get("vdim", E), dtype=dtype)
    if kind == "unbatched":
        query = query[:, 0].contiguous()
    elif options.get("batch_first"):
        query, key, value = (t.transpose(0, 1).contiguous() for t in (query, key, value))
    if kind in ("self", "unbatched"):
        return query, query, query
    return query, key, key if kind == "memory" else value


def masks(name, kind, dtype=torch.float64):
    batch = 1 if kind == "unbatched" else BATCH
    sources = LENGTH if kind in ("self", "unbatched") else SOURCES
    hidden = torch.zeros(LENGTH, sources, dtype=torch.bool)
    hidden[1, 2] = hidden[0, 1] = True
    padding = torch.zeros(batch, sources, dtype=torch.bool)
    padding[0, -1] = True
    padding = padding[0] if kind == "unbatched" else padding
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(LENGTH, sources, dtype=dtype)},
        "per head": {"attn_mask": torch.randn(batch * HEADS, LENGTH, sources, dtype=dtype)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(LENGTH, sources).triu(1).bool(), "is_causal": True},
    }[name]


def both(options, dtype=torch.float64, training=True):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(E, HEADS, dtype=dtype, **options).train(training)
    return plain, neq.convert(copy.deepcopy(plain))


def run(module, arguments, options):
    torch.manual_seed(2)
    return module(*arguments, **options)


def cases():
    """Every module with every mask, the other settings in turn."""
    kinds = itertools.cycle(["self", "memory", "three", "unbatched"])
    weights = itertools.cycle([None, "mean", "each"])
    for (name, options), mask in itertools.product(MODULES.items(), MASKS):
        kind, wanted = "three" if "kdim" in options else next(kinds), next(weights)
        yield pytest.param(options, kind, mask, wanted, id=f"{name}-{kind}-{mask}-{wanted}")


@pytest.mark.parametrize(("options", "kind", "mask", "weights"), list(cases()))
def test_it_is_pytorchs_with_gradients_of_active_rows(options, kind, mask, weights):
    arguments = inputs(options, kind)
    settings = masks(mask, kind) | {
        "need_weights": weights is not None,
        "average_attn_weights": weights == "mean",
    }
    plain, ours = both(options)
    for rows, out_rows in ROWS.values():
        ours.in_proj_channels.set(list(rows))
        ours.out_proj.channels.set(list(out_rows))
        for learns in (True, False):
            leaves = [t.clone().requires_grad_(learns) for t in dict.fromkeys(arguments)]
            found = []
            for module in (plain, ours):
                leaf = dict(zip(dict.fromkeys(arguments), leaves, strict=True))
                module.zero_grad()
                out, attended = run(module, [leaf[t] for t in arguments], settings)
                if out.requires_grad:
                    probe = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
                    (out * probe).sum().backward()
                found.append((out, attended, [t.grad for t in leaves]))
                for tensor in leaves:
                    tensor.grad = None
            (out, attended, dense), (our_out, our_attended, grads) = found
            assert torch.equal(our_out, out)
            assert (attended is None) == (our_attended is None) == (weights is None)
            assert attended is None or torch.equal(our_attended, attended)
            for grad, expected in zip(grads, dense, strict=True):
                assert expected is None or torch.allclose(grad, expected, rtol=1e-10, atol=1e-12)
            assert_rows(ours, plain)
    if not options.get("add_bias_kv"):
        assert not our_out.requires_grad  # of the last round: all frozen, on constants


def assert_rows(ours, plain):
    owners = neuron_owners(ours)
    for (name, parameter), dense in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if parameter not in owners:
            oracle.assert_close64(parameter.grad, dense.grad, 1e-9)
            continue
        ((channels, _),) = owners[parameter]
        if channels.none_active:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        mask = channels.mask
        oracle.assert_frozen_are_zero(parameter.grad, mask.tolist())
        oracle.assert_close64(parameter.grad[mask], dense.grad[mask], 1e-9)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("learns", [True, False])
def test_a_wholly_frozen_one_is_pytorchs_in_float32(batch_first, learns):
    """PyTorch multiplies an input that is batch-first otherwise if no weight requires a gradient,
    and gets other bits: many small products."""
    plain, ours = both({"batch_first": batch_first}, torch.float32)
    for layer in (ours, ours.out_proj):
        layer.channels.set([])
    x = torch.randn(16, 50, E, requires_grad=learns)
    with oracle.CalledOps() as called:
        out = ours(x, x, x, need_weights=False)[0]
    assert "bmm" not in called.names
    assert torch.equal(out, plain(x, x, x, need_weights=False)[0])
    assert out.requires_grad == learns


def test_self_attention_is_one_product():
    _, ours = both({"batch_first": True})
    x = torch.randn(2, LENGTH, E, dtype=torch.float64)
    ours.channels.set([0, 9])
    with oracle.CalledOps() as called:
        ours(x, x, x, need_weights=False)
    assert called.names.count("mm") + called.names.count("addmm") == 2


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_it_is_pytorchs_fast_path_and_all(training):
    plain, ours = both({"batch_first": True}, torch.float32, training)
    ours.channels.set([1])
    x = torch.randn(2, LENGTH, E)
    with torch.no_grad(), oracle.CalledOps() as called:
        assert torch.equal(ours(x, x, x)[0], plain(x, x, x)[0])
    assert called.names.count("_native_multi_head_attention") == (0 if training else 2)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}], ids=str)
def test_it_owns_its_parameters_in_place(options):
    plain, _ = both(options)
    ours = copy.deepcopy(plain)
    before = dict(ours.named_parameters())
    names = [name for name, _ in ours.named_modules()]
    neq.convert(ours)
    assert type(ours) is MultiheadAttention
    assert dict(ours.named_parameters()) == before
    assert [name for name, _ in ours.named_modules()] == names
    assert ours.in_proj_channels is ours.channels
    assert len(ours.channels) == 3 * E
    assert set(neuron_owners(ours)) == set(ours.parameters())
    assert not neq.conversion_report(ours).others
    ours.load_state_dict(plain.state_dict())
    neq.revert(ours)
    assert type(ours) is nn.MultiheadAttention
    assert type(ours.out_proj) is type(plain.out_proj)
    assert vars(ours).keys() == vars(plain).keys()


def test_a_subclass_that_inherits_its_forward_is_converted():
    class Own(nn.MultiheadAttention):
        pass

    ours = neq.convert(Own(E, HEADS))
    ours.channels.set([0])
    x = torch.randn(LENGTH, BATCH, E)
    ours(x, x, x)[0].square().sum().backward()
    oracle.assert_frozen_are_zero(ours.in_proj_weight.grad, [i == 0 for i in range(3 * E)])
    assert isinstance(ours, Own)


def test_left_alone_its_output_projection_still_has_neurons():
    """nn.MultiheadAttention reads the weight of out_proj and does not call it."""
    model = nn.Sequential(nn.MultiheadAttention(E, HEADS, dtype=torch.float64))
    plain = copy.deepcopy(model)
    neq.convert(model, filter=lambda name, _: name != "0")
    model[0].out_proj.channels.set([1, 2])
    x = torch.randn(LENGTH, BATCH, E, dtype=torch.float64)
    for module in (plain, model):
        module[0](x, x, x)[0].square().sum().backward()
    assert_model_gradients(model, plain)


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, 0.01),
    ],
    ids=["AdamW", "SGD", "guard"],
)
def test_frozen_rows_of_queries_keys_and_values_do_not_move(options, make):
    _, ours = both(options)
    optimizer = make(ours.parameters())
    neq.attach(optimizer, ours)
    arguments = inputs(options, "three")
    for rows in ([*range(3 * E)], [0, 9], [8, 23], [], [*range(5, 20)]):
        ours.channels.set(rows)
        before = {p: p.detach().clone() for p in ours.parameters()}
        for _ in range(2):
            optimizer.zero_grad()
            out = ours(*arguments)[0]
            out.square().sum().backward()
            optimizer.step()
        for parameter, ((channels, layout),) in neuron_owners(ours).items():
            for neurons, moves in ((channels.frozen, False), (channels.active, True)):
                now, then = (layout.gather(p, neurons) for p in (parameter, before[parameter]))
                # A shift of all keys changes nothing: their bias may have no gradient.
                assert torch.equal(now, then) or moves
                assert not moves or parameter.dim() == 1 or bool((now != then).any(-1).all())


def test_masks_survive_copies():
    _, ours = both({})
    ours.channels.set([1, 9])
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert other.channels.active.tolist() == [1, 9]
        other.channels.set([8])
        x = torch.randn(LENGTH, BATCH, E, dtype=torch.float64)
        other(x, x + 1, x + 1)[0].square().sum().backward()
        oracle.assert_frozen_are_zero(other.in_proj_weight.grad, [i == 8 for i in range(3 * E)])
    assert ours.channels.active.tolist() == [1, 9]


@pytest.mark.parametrize("key_is_value", [True, False])
def test_a_mask_changed_before_backward_is_an_error(key_is_value):
    _, ours = both({})
    query, key, value = inputs({}, "memory" if key_is_value else "three")
    ours.channels.set([9])
    out = ours(query, key, value)[0]
    ours.channels.set([10])
    with pytest.raises(RuntimeError, match="active channels of a layer were changed"):
        out.sum().backward()


@pytest.mark.parametrize("shape", [(LENGTH, LENGTH + 1), (BATCH * HEADS + 1, LENGTH, LENGTH)])
def test_a_mask_of_another_shape_is_an_error(shape):
    _, ours = both({})
    x = torch.randn(LENGTH, BATCH, E, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="attn_mask: expected shape"):
        ours(x, x, x, attn_mask=torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="attn_mask: expected the causal mask"):
        ours(x, x, x, is_causal=True)


def test_one_graph_for_all_masks():
    _, ours = both({"batch_first": True}, torch.float32)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = torch.randn(2, LENGTH, E)
    for rows in ([*range(3 * E)], [1, 9], [8]):
        ours.channels.set(rows)
        grads = []
        for module in (ours, compiled):
            ours.zero_grad()
            module(x, x, x)[0].square().sum().backward()
            grads.append(ours.in_proj_weight.grad)
        assert torch.allclose(*grads, atol=1e-5)
        oracle.assert_frozen_are_zero(grads[1], [i in rows for i in range(3 * E)])


class Attentive(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.below, self.above = nn.Linear(E, E), nn.Linear(E, 2)
        self.attention = nn.MultiheadAttention(E, HEADS, **options)

    def forward(self, query, key, value):
        return self.above(self.attention(self.below(query), key, value)[0])


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}], ids=str)
@pytest.mark.usefixtures("process_group")
def test_projections_stop_and_start_in_data_parallel_training(options):
    torch.manual_seed(0)
    ours = neq.convert(Attentive(**options).double())
    alone = copy.deepcopy(ours)
    wrapped = DistributedDataParallel(ours)
    arguments = inputs(options, "three")
    for rows, below in ((range(3 * E), E), (range(E), 0), (range(E, 3 * E), 0), ([], 0), ([3], E)):
        for model in (ours, alone):
            model.attention.channels.set(list(rows))
            model.attention.out_proj.channels.set([0] if rows else [])
            model.below.channels.set(range(below))
        for model, run in ((ours, wrapped), (alone, alone)):
            model.zero_grad()
            run(*arguments).square().sum().backward()
        for found, expected in zip(ours.parameters(), alone.parameters(), strict=True):
            zero = torch.zeros_like(expected)
            assert torch.equal(found.grad, zero if expected.grad is None else expected.grad)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Transformer(E, HEADS, 1, 1, 16, batch_first=True)

    def forward(self, x):
        return self.model(x, x[:, :3] + 1)


@pytest.mark.parametrize("memory", ["snapshot", "activations"])
@pytest.mark.parametrize("similarity", ["neuron", "sample"])
def test_controllers_see_every_projected_feature(memory, similarity):
    """Keys and values are longer than queries in the decoder's attention over the encoder."""
    torch.manual_seed(0)
    model = neq.convert(Decoder())
    controller = neq.NEqController(
        model, [torch.randn(2, LENGTH, E)], memory=memory, similarity=similarity, warmup=0
    )
    encoder = model.model.encoder.layers[0].self_attn
    decoder = model.model.decoder.layers[0].multihead_attn
    with torch.no_grad():
        encoder.in_proj_weight[3] *= -1
        decoder.in_proj_weight[[2, 20]] *= -1
    controller.step()
    assert encoder.channels.active.tolist() == [3]
    assert {2, 20} <= set(decoder.channels.active.tolist())
    assert decoder.channels.n_active < 3 * E
    assert not encoder._watchers


def test_a_probe_with_padding_is_watched():
    """Without gradients torch's encoder would pack it into a nested tensor."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True), 2)
    model = neq.convert(encoder)
    padding = torch.tensor([[False] * LENGTH, [False] * 3 + [True] * 2])
    probe = [{"src": torch.randn(2, LENGTH, E), "src_key_padding_mask": padding}]
    controller = neq.NEqController(model, probe, include_output=True)
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight[5] *= -1
    controller.step()
    assert model.layers[1].self_attn.channels.active.tolist() == [5]
    assert torch.backends.mha.get_fastpath_enabled()


def test_transformers_are_converted_whole():
    torch.manual_seed(0)
    plain = Decoder().double().eval()
    ours = neq.convert(copy.deepcopy(plain))
    x = torch.randn(2, LENGTH, E, dtype=torch.float64)
    assert neq.verify(ours, x) == []
    for _, layer in ours.named_modules():
        if isinstance(layer, neq.nn.Linear | MultiheadAttention):
            layer.channels.set(range(0, len(layer.channels), 2))
    for model in (plain, ours):
        model(x).square().sum().backward()
    assert_model_gradients(ours, plain)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
