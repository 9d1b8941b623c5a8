"""The CIFAR ResNets of the benchmarks, and the factory."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from benchmarks.common.models import OWN_MODELS, build, load_weights


@pytest.mark.parametrize(
    ("name", "parameters"),  # He et al., table 6
    [
        ("resnet20", "0.27"),
        ("resnet32", "0.46"),
        ("resnet44", "0.66"),
        ("resnet56", "0.85"),
        ("resnet110", "1.73"),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    model = build(name)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == parameters
    layers = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in model.modules())
    assert layers == int(name.removeprefix("resnet"))


def test_parameter_names():
    names = set(build("resnet20").state_dict())
    assert {"conv1.weight", "bn1.running_var", "linear.weight", "linear.bias"} <= names
    assert {"layer1.0.conv1.weight", "layer3.2.bn2.bias"} <= names
    prefixes = {name.split(".")[0] for name in names}
    assert prefixes == {"conv1", "bn1", "layer1", "layer2", "layer3", "linear"}


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_output_shape(channels, size):
    model = build("resnet20", 7, channels)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = build("resnet20").layer2[0]
    x = torch.randn(1, 16, 4, 4)
    shortcut = block.shortcut(x)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert (shortcut[:, :8] == 0).all()
    assert (shortcut[:, 24:] == 0).all()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_back(tmp_path, suffix):
    source = build("resnet20")
    path = tmp_path / f"weights{suffix}"
    weights = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(weights, path)
    loaded = build("resnet20", pretrained_path=path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in weights.items())


def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(build("resnet20", num_classes=7).state_dict(), path)
    model = build("resnet20")
    before = model.linear.weight.clone()
    with pytest.raises(ValueError, match=r"linear.weight: expected \(10, 64\), got \(7, 64\)"):
        load_weights(model, path)
    assert torch.equal(model.linear.weight, before)
    with pytest.raises(ValueError, match=r"missing layer1.3"):
        load_weights(build("resnet32"), path)


def test_unreadable_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="cannot read"):
        build("resnet20", pretrained_path=path)
    with pytest.raises(FileNotFoundError, match="weights: no file"):
        build("resnet20", pretrained_path=tmp_path / "absent.pt")


def test_names_that_are_not_ours_go_to_the_libraries():
    assert build("timm:resnet18", 5, in_channels=1).num_classes == 5
    with pytest.raises(ValueError, match="none called"):
        build("resnet23")


def test_depth_must_be_6n_plus_2():
    from benchmarks.common.models import CifarResNet

    with pytest.raises(ValueError, match="6n"):
        CifarResNet(21)
    assert len(OWN_MODELS) == 5
