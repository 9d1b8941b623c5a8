"""Measuring which strategies are fastest for the layers of a model; saving and restoring them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from neq_kernels.backends.problem import KernelChoice, Problem
from neq_kernels.conversion.convert import revert
from neq_kernels.dispatch import autotune
from neq_kernels.dispatch.calibration import Calibration
from neq_kernels.dispatch.selection import selector
from neq_kernels.dispatch.stopwatch import CudaClock
from neq_kernels.dispatch.tuning_table import count_bucket, parsed
from neq_kernels.doctor import runner
from neq_kernels.layers.traversal import unwrap
from neq_kernels.measure.problems import problems_of
from neq_kernels.optim.dense_serving import DenseServing

logger = logging.getLogger(__name__)

_DEVICE_TYPES = ("cpu", "cuda")
_DENSE = "dense"


def tune(
    model: nn.Module,
    *inputs: Any,
    shares: Sequence[float] | None = None,
    seconds: float = 0.05,
) -> dict[str, dict[int, KernelChoice]]:
    """Measure the strategies for every linear layer and convolution of a model, keep the winners.

    From then on the layers use them: in this process, and in later ones on the same kind of GPU, or
    of CPU with the same number of threads. Weight gradients of another shape, and numbers of active
    channels that were not measured, go by the cost model as before. On a GPU those custom kernels
    take part that the self-check of ``neq doctor`` found right there; where it never ran it runs
    first.

    Args:
        model: converted or not; it is not changed. On the CPU or on one GPU.
        inputs: of one forward, with the batch size and image size of the training steps; or one
            dict of keyword arguments.
        shares: of active channels, each above 0 and at most 1; by default every number of channels
            that the table tells apart, which takes minutes for a large network.
        seconds: to spend on each measurement.

    Returns:
        by layer, the winner for each measured number of active channels.

    Raises:
        ValueError: a share out of range, no layer to measure, or a model that is neither on the CPU
            nor on one GPU.
    """
    if shares is not None and not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares: expected above 0 and at most 1, got {list(shares)}")
    plain = revert(copy.deepcopy(unwrap(model)))
    devices = {p.device for p in plain.parameters()}
    if len(devices) > 1 or any(device.type not in _DEVICE_TYPES for device in devices):
        found = sorted(map(str, devices))
        raise ValueError(f"model: expected parameters on the CPU or on one GPU, got {found}")
    layers = problems_of(plain, *inputs)
    if not layers:
        raise ValueError("model: expected linear layers or convolutions, got none that ran")
    device = devices.pop()
    if device.type == "cuda" and selector.verified.names() is None:
        logger.info("checking the kernels on this GPU, once")
        runner.prove()
    context = selector.context(device.type)
    table = selector.table(context)
    clock = None if device.type == "cpu" else CudaClock(device)
    winners: dict[Problem, dict[int, KernelChoice]] = {}
    for name, problem in layers.items():
        if problem in winners:
            continue
        winners[problem] = {
            n: autotune.fastest(
                problem,
                n,
                selector.candidates(problem, n, context),
                device,
                seconds,
                clock,
            )
            for n in _counts(problem.neurons, shares)
        }
        for n, winner in winners[problem].items():
            table.put(problem, n, winner)
        logger.info("tuned %s: %d of %d problems", name, len(winners), len(set(layers.values())))
    selector.forget_choices()
    table.save()
    return {name: winners[problem] for name, problem in layers.items()}


def tuning_state_dict() -> dict[str, Any]:
    """What kernels are chosen by, for a checkpoint: the measured winners, the calibration of the
    CPU and the backends in use, by type of device; those of the present number of threads and,
    where there is one, of the GPU. And, where PyTorch's dense kernels serve a model by the verdict
    of a step check, which model, with which masks."""
    contexts = [selector.context(name) for name in _device_types()]
    state: dict[str, Any] = {
        context.device_type: {
            **selector.table(context).state_dict(),
            "backends": list(context.backends),
            "calibration": selector.costs.calibration(context).to_dict(),
        }
        for context in contexts
    }
    verdicts = DenseServing.verdicts()
    return {**state, _DENSE: verdicts} if verdicts else state


def load_tuning_state_dict(state: Mapping[str, Any]) -> None:
    """Choose kernels exactly as when a checkpoint was saved, so that a resumed run makes the same
    bits: by its winners, its calibration and its verdicts on whole steps. Nothing is measured from
    then on. Where other backends are in use than were then the bits may differ; a warning says so.

    Raises:
        ValueError: ``state`` is not what :func:`tuning_state_dict` returned; nothing is changed.
    """
    if not isinstance(state, Mapping) or not set(state) <= {*_DEVICE_TYPES, _DENSE}:
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"tuning: expected winners for {list(_DEVICE_TYPES)}, got {found}")
    state = dict(state)
    verdicts = state.pop(_DENSE, [])
    if not isinstance(verdicts, list) or not all(isinstance(v, str) for v in verdicts):
        raise ValueError(f"tuning: expected a list of strings for {_DENSE!r}, got {verdicts!r}")
    calibrations = {}
    for device_type, saved in state.items():
        parsed(saved)
        if saved.get("calibration") is not None:
            calibrations[device_type] = Calibration.from_dict(saved["calibration"])
    selector.restored()
    for device_type, saved in state.items():
        context = selector.context(device_type)
        selector.table(context).load_state_dict(saved)
        # States of 0.1.0 have none.
        known = calibrations.get(device_type) or selector.costs.uncalibrated(context)
        selector.costs.use(context, known)
        before, now = saved.get("backends"), list(context.backends)
        if device_type in _device_types() and before not in (None, now):
            logger.warning(
                "tuning: %s tensors were given to %s, now to %s: bits may differ (see neq doctor)",
                *(device_type, before, now),
            )
    selector.forget_choices()
    DenseServing.load(verdicts)


def _device_types() -> tuple[str, ...]:
    """Those that can be used here."""
    return _DEVICE_TYPES if torch.cuda.is_available() else ("cpu",)


def _counts(k: int, shares: Sequence[float] | None) -> list[int]:
    counts = range(1, k + 1) if shares is None else [max(1, round(s * k)) for s in shares]
    return sorted({count_bucket(n, k) for n in counts})
