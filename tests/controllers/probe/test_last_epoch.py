"""The two φ memories: they agree, they refresh, and the snapshot notices what it cannot do."""

import gc
import warnings

import pytest
import torch
from torch import nn

import neq_kernels as neq
from neq_kernels.controllers import NEqController
from neq_kernels.controllers.probe.similarity import NeuronSimilarity, SampleSimilarity
from neq_kernels.layers.traversal import named_neuron_layers
from tests.support.nets import Block, conv_net, images, masks, tokens, train, wiggle


class Tied(nn.Module):
    """One layer called twice, one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.up = nn.Linear(6, 4)
        self.down = nn.Linear(6, 4, bias=False)
        self.down.weight = self.up.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.mix(torch.tanh(self.mix(x))))
        return self.head(torch.relu(self.up(x)) + self.down(x))


NETS = {
    "conv": (conv_net, images),
    "conv, channels last": (
        lambda: conv_net().to(memory_format=torch.channels_last),
        lambda: [x.to(memory_format=torch.channels_last) for x in images()],
    ),
    "tokens": (lambda: neq.convert(Block()), tokens),
    "tied": (lambda: neq.convert(Tied()), tokens),
    "float64": (lambda: conv_net().double(), lambda: [x.double() for x in images()]),
    "bfloat16": (lambda: conv_net().bfloat16(), lambda: [x.bfloat16() for x in images()]),
}


def outputs_by_hand(model, probe):
    """What forward hooks see, everything stored: the slow way to the same φ."""
    recorded = {}
    handles = [
        layer.register_forward_hook(
            lambda module, args, out, name=name: recorded.setdefault(name, []).append(out.clone())
        )
        for name, layer in named_neuron_layers(model)
    ]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    with torch.no_grad():
        for x in probe:
            model(x)
    for handle in handles:
        handle.remove()
    for module, mode in modes.items():
        module.training = mode
    return recorded


def phi_by_hand(old, new, layer, similarity):
    total = similarity()
    for a, b in zip(old, new, strict=True):
        total.add(a, b, layer.channel_dim(b))
    total.end_batch()
    return similarity.phi(total.sums())


@pytest.mark.parametrize("net", NETS)
def test_both_memories_agree_with_stored_outputs(net):
    make, inputs = NETS[net]
    model, probe = make(), inputs()
    snapshot = NEqController(model, probe)
    activations = NEqController(model, probe, memory="activations")
    old = outputs_by_hand(model, probe)
    for epoch in range(3):
        train(model, [x.to(next(model.parameters()).dtype) for x in inputs()], seed=epoch)
        wiggle(model, 0.05, seed=epoch)
        new = outputs_by_hand(model, probe)
        snapshot.step()
        for layer in model.modules():
            if hasattr(layer, "channels"):
                layer.channels.reset()
        activations.step()
        for name, layer in named_neuron_layers(model):
            expected = phi_by_hand(old[name], new[name], layer, NeuronSimilarity)
            assert not bool((expected == 1).all()), name
            for controller in (snapshot, activations):
                found = controller.response.phi[name]
                assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-7), name
        old = new


def test_samples_in_one_batch_or_many():
    found = []
    for probe in ([torch.cat(images())], images(), [x[None] for x in torch.cat(images())]):
        torch.manual_seed(0)
        model = conv_net()
        controller = NEqController(model, probe, similarity="sample")
        old = outputs_by_hand(model, [torch.cat(images())])
        wiggle(model)
        new = outputs_by_hand(model, [torch.cat(images())])
        controller.step()
        expected = {
            name: phi_by_hand(old[name], new[name], layer, SampleSimilarity).tolist()
            for name, layer in named_neuron_layers(model)
        }
        found.append(controller.response.phi)
        for name, phi in found[-1].items():
            assert phi.tolist() == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("memory", ["snapshot", "activations"])
def test_nothing_changed_gives_exactly_one_and_freezes_all_but_the_output(memory):
    for net in NETS:
        make, inputs = NETS[net]
        model = make()
        controller = NEqController(model, inputs(), memory=memory, eps=0)
        controller.step()
        assert all(bool((phi == 1).all()) for phi in controller.response.phi.values()), net
        active = {name: any(mask) for name, mask in masks(model).items()}
        assert [name for name, on in active.items() if on] == controller.outputs


@pytest.mark.parametrize("memory", ["snapshot", "activations"])
def test_the_memory_is_refreshed_by_each_step_and_by_nothing_else(memory):
    model = conv_net()
    controller = NEqController(model, images(), memory=memory, eps=0)
    wiggle(model, seed=1)
    controller.step()
    first = controller.response.phi["3"]
    assert bool((first < 1).all())
    controller.step()
    assert bool((controller.response.phi["3"] == 1).all())


@pytest.mark.parametrize("memory", ["snapshot", "activations"])
def test_running_statistics_count(memory):
    """Only a buffer changes: φ of the batch norm must notice."""
    model = conv_net()
    controller = NEqController(model, images(), memory=memory)
    model[1].running_mean += torch.linspace(0, 1, 6)
    controller.step()
    assert bool((controller.response.phi["0"] == 1).all())
    assert controller.response.phi["1"][0] == 1
    assert bool((controller.response.phi["1"][1:] < 1).all())


class Routed(nn.Module):
    """Chooses by the sign of a weight which of two layers runs, and how often."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 6)
        self.left = nn.Linear(6, 6)
        self.right = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.stem_only = False
        neq.convert(self)
        with torch.no_grad():
            self.gate.weight[0, 0] = 1.0

    def forward(self, x):
        x = self.left(self.gate(x))
        x = self.left(x) if self.gate.weight[0, 0] > 0 else self.right(x[:1])
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("memory", ["snapshot", "activations"])
def test_layers_that_do_not_run_alike_stay_active(memory):
    model = Routed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    neq.attach(optimizer, model)
    with pytest.warns(UserWarning, match=r"stay active: \['right', 'unused'\]"):
        controller = NEqController(model, tokens(), memory=memory, eps=10)
    with torch.no_grad():
        model.gate.weight[0, 0] = -1.0
    with pytest.warns(UserWarning, match=r"stay active: \['left', 'head'\]"):
        controller.step()
    active = {name: all(mask) for name, mask in masks(model).items()}
    assert active == {"gate": False, "left": True, "right": True, "unused": True, "head": True}
    assert set(controller.history[0]["layers"]["gate"]) == {
        "active",
        "total",
        "phi_mean",
        "velocity_abs_mean",
    }
    assert set(controller.history[0]["layers"]["right"]) == {"active", "total"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.step()
    active = {name: all(mask) for name, mask in masks(model).items()}
    assert active == {"gate": False, "left": False, "right": False, "unused": True, "head": True}


def test_no_layer_ran():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return x

    for memory in ("snapshot", "activations"):
        with pytest.raises(ValueError, match="expected it to run converted layers"):
            NEqController(neq.convert(Idle()), [torch.ones(2, 3)], memory=memory, outputs=[])


class Stubborn(nn.Module):
    """Runs with its own weights whatever is put in their place, as a sharded module does."""

    def __init__(self):
        super().__init__()
        self.net = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        for module in self.net:
            own = dict(module.named_parameters())
            module.register_forward_pre_hook(
                lambda module, args, own=own: module._parameters.update(own)
            )

    def forward(self, x):
        return self.net(x)


def test_the_snapshot_notices_a_model_that_ignores_replaced_weights():
    model = Stubborn()
    with pytest.raises(
        ValueError, match=r"memory: 'snapshot' does not support.*memory='activations'"
    ):
        NEqController(model, [torch.randn(4, 3)], outputs=[])
    controller = NEqController(model, [torch.randn(4, 3)], outputs=[], memory="activations")
    wiggle(model)
    controller.step()
    assert bool((controller.response.phi["net.0"] < 1).any())


def test_the_self_check_does_not_cry_wolf():
    """One sample, zero weights, constant weights, a zero input: all can be served."""
    for fill in (0.0, 1.0):
        model = neq.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        for parameter in model.parameters():
            nn.init.constant_(parameter, fill)
        NEqController(model, [torch.zeros(1, 3)])
        NEqController(model, [torch.ones(1, 3)])


def test_a_model_whose_parameters_were_exchanged():
    model = conv_net()
    controller = NEqController(model, images())
    model[9].weight = nn.Parameter(torch.randn(7, 8))
    model[0].bias = nn.Parameter(torch.zeros(6))
    with pytest.raises(ValueError, match=r"unknown \['0.bias'\].*9.weight expected shape \(5, 8\)"):
        controller.step()


def test_a_model_that_moved_to_another_dtype():
    model = conv_net().double()
    controller = NEqController(
        model,
        [x.double() for x in images()],
        forward=lambda m, x: m(x.to(next(m.parameters()).dtype)),
    )
    model.float()
    controller.step()
    assert float(controller.response.phi["9"].min()) > 0.999999
    controller.step()
    assert bool((controller.response.phi["9"] == 1).all())


@pytest.mark.parametrize("how", ["wrapped", "in place", "submodule"])
@pytest.mark.parametrize("memory", ["snapshot", "activations"])
def test_compiled_models(how, memory):
    runs = []

    def backend(graph, example_inputs):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    plain = conv_net()
    compiled = conv_net()
    compiled.load_state_dict(plain.state_dict())
    if how == "wrapped":
        compiled = torch.compile(compiled, backend=backend)
    elif how == "in place":
        compiled.compile(backend=backend)
    else:
        compiled[3] = torch.compile(compiled[3], backend=backend)
    compiled.eval()
    compiled(images()[0])
    assert runs
    controllers = [NEqController(m, images(), memory=memory) for m in (plain, compiled)]
    for model, controller in zip((plain, compiled), controllers, strict=True):
        wiggle(model)
        runs.clear()
        controller.step()
        assert not runs
    a, b = (list(c.response.phi.values()) for c in controllers)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    compiled(images()[0])
    assert runs
    torch._dynamo.reset()


def test_the_snapshot_holds_one_batch_of_outputs():
    """Tensors of the first two layers' output shape that step() keeps alive, at each forward."""
    alive = []

    def forward(model, batch):
        shape = (4, 6, 6, 6)
        alive.append(sum(type(o) is torch.Tensor and o.shape == shape for o in gc.get_objects()))
        return model(batch)

    model = conv_net()
    controller = NEqController(model, images(4), forward=forward)
    alive.clear()
    gc.collect()
    gc.freeze()
    try:
        controller.step()
    finally:
        gc.unfreeze()
    # Four batches, old model and new: nothing before the old one, its two outputs before the new.
    assert alive == [0, 2] * 4
