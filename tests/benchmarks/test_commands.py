"""Every command of ``benchmarks``: by its own name, and with its help."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from benchmarks.common.files import ROOT
from benchmarks.suite import __main__ as suite
from benchmarks.suite import page
from tests.docs.pages import modules

SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))


def name_of(source: Path) -> str:
    """By which ``python -m`` runs it."""
    name = ".".join(source.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__main__")


def has_main(source: Path) -> bool:
    body = ast.parse(source.read_text()).body
    return any(isinstance(each, ast.FunctionDef) and each.name == "main" for each in body)


COMMANDS = {name_of(source): source for source in SOURCES if has_main(source)}


def test_commands_are_found() -> None:
    assert {"benchmarks.suite", "benchmarks.kernels.gpu", "benchmarks.training.report"} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    of_package = COMMANDS[name].name == "__main__.py"
    module = importlib.import_module(f"{name}.__main__" if of_package else name)
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert re.match(r"usage: (python -m [\w.]+) \[-h\]", said).group(1) == f"python -m {name}"
    assert str(module.__doc__).splitlines()[0] in said


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_commands_that_are_named_exist(source: Path) -> None:
    named = {name for name in modules(source.read_text()) if name.startswith("benchmarks.")}
    assert named <= set(COMMANDS)


def test_the_suite_has_a_command_and_a_table_for_each_part() -> None:
    assert set(suite.PARTS.values()) <= set(COMMANDS)
    assert list(suite.PARTS) == list(page.TABLES)
