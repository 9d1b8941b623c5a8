from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from benchmarks.common import cli


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (cli.positive, "12", 12),
        (cli.seconds, "0.5", 0.5),
        (cli.minutes, "9", 9.0),
        (cli.share, "0", 0.0),
        (cli.share, "1", 1.0),
    ],
)
def test_good_arguments(kind: Callable[[str], float], text: str, value: float) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "expected", "texts"),
    [
        (cli.positive, "a whole number above 0", ("0", "-1", "1.5", "x", "")),
        (cli.seconds, "seconds above 0", ("0", "-1", "nan", "inf", "x", "")),
        (cli.minutes, "minutes above 0", ("0", "-1", "nan", "inf", "x", "")),
        (cli.share, "a share between 0 and 1", ("-0.1", "1.1", "nan", "x", "")),
    ],
)
def test_bad_arguments(kind: Callable[[str], float], expected: str, texts: tuple[str, ...]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            kind(text)
        assert str(refused.value) == f"expected {expected}, got {text!r}"
