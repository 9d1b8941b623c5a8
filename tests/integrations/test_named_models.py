"""Models by name."""

from __future__ import annotations

import pytest
from torch import nn

from neq_kernels.integrations.named_models import named_model


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "resnet18", "timm:resnet18", "torch.nn:Flatten"]
)
def test_names_are_resolved(name):
    assert isinstance(named_model(name), nn.Module)


def test_classes_and_input_channels_reach_the_constructor():
    model = named_model("timm:resnet18", num_classes=7, in_channels=1)
    assert model.fc.out_features == 7
    assert model.conv1.in_channels == 1
    assert named_model("torchvision:resnet18", num_classes=7).fc.out_features == 7


def test_a_bare_name_falls_through_to_timm():
    assert named_model("test_resnet", num_classes=3).get_classifier().out_features == 3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet181", ValueError, "did you mean resnet1"),
        ("torchvision:nothing_like_it", ValueError, "torchvision has none called"),
        ("timm:nothing_like_it", ValueError, "timm has none called"),
        ("no_such_package:model", ImportError, "no_such_package: cannot be imported"),
        ("torch.nn:NoSuchLayer", ValueError, "has no callable 'NoSuchLayer'"),
        ("builtins:dict", TypeError, "expected a torch.nn.Module, got dict"),
    ],
)
def test_errors_name_what_is_wrong(name, error, message):
    with pytest.raises(error, match=message):
        named_model(name)


def test_torchvision_takes_three_channels_only():
    with pytest.raises(ValueError, match=r"in_channels: torchvision's resnet18 takes 3, got 1"):
        named_model("torchvision:resnet18", in_channels=1)


def test_an_option_the_constructor_refuses_raises():
    with pytest.raises(TypeError, match="no_such_option"):
        named_model("torchvision:resnet18", no_such_option=1)
