"""Update policies: which neurons are trained in the next epoch, and who decides."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import neq_kernels as neq
from benchmarks.training.settings import Settings, read_masks
from neq_kernels.layers.traversal import named_neuron_layers


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """torch's own optimizer, as a user would write it."""
    s = settings
    if s.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
        )
    adam = torch.optim.Adam if s.optimizer == "adam" else torch.optim.AdamW
    return adam(parameters, lr=s.lr, betas=(s.momentum, 0.999), weight_decay=s.weight_decay)


def apply_policy(
    model: nn.Module, settings: Settings, probe: list[Tensor]
) -> tuple[torch.optim.Optimizer, neq.Controller | None]:
    """The optimizer and controller that make ``model`` (changed in place) train by the policy.

    ``dense`` leaves model and optimizer exactly PyTorch's own and has no controller.
    """
    if settings.policy == "dense":
        return make_optimizer(model.parameters(), settings), None
    neq.convert(model, others=settings.others)
    optimizer = make_optimizer(model.parameters(), settings)
    neq.attach(optimizer, model, frozen_state=settings.frozen_state)
    return optimizer, _controller(model, settings, probe)


def _controller(model: nn.Module, settings: Settings, probe: list[Tensor]) -> neq.Controller:
    s = settings
    if s.policy == "fixed" and s.masks is not None:
        return neq.FixedController(model, read_masks(s.masks))
    if s.policy == "stochastic":
        return neq.StochasticController(model, s.p, warmup=s.warmup, seed=s.seed, probe=probe)
    return neq.NEqController(
        model,
        probe,
        eps=s.eps,
        mu=s.mu,
        warmup=s.warmup,
        velocity=s.velocity,
        similarity=s.similarity,
    )


def active_counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """``{layer: (active neurons, all neurons)}`` of a converted model, {} of a plain one."""
    return {
        name: (layer.channels.n_active, len(layer.channels))
        for name, layer in named_neuron_layers(model)
    }
