"""Which module may import which. docs/architecture.md shows the same order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "neq_kernels"
# Modules of neq_kernels, or packages of them, lowest first. A module imports from its own row and
# from rows below. The package itself, which re-exports, stands above all.
ORDER = (
    ("version", "machine"),
    ("channels", "process_group", "sharding"),
    ("backends.problem", "backends.base"),
    ("backends",),
    ("dispatch",),
    ("ops",),
    ("autograd",),
    ("functional",),
    ("layers",),
    ("nn", "conversion", "optim"),
    ("measure",),
    ("controllers", "conversion.verify"),
    ("model_tuning", "doctor", "distributed", "integrations"),
    ("cli", "cli_arguments"),
)
# The backends that a backend derives from.
BASES = {
    "reference": (),
    "aten": (),
    "cpu": ("aten",),
    "gpu_base": ("aten",),
    "cuda": ("aten", "gpu_base"),
    "triton": ("aten", "gpu_base"),
}
# What files of the repository's folders import from these folders. (Tests import anything.)
ALLOWED = {
    "neq_kernels": ("neq_kernels",),
    "benchmarks": ("neq_kernels", "benchmarks"),
    "examples": ("neq_kernels",),
    "docs": (),
    "setup.py": (),
}
# Every other __init__.py is empty: a re-export would close an import cycle.
RE_EXPORT = {
    "neq_kernels",
    "neq_kernels/controllers",
    "neq_kernels/distributed",
    "neq_kernels/measure",
    "neq_kernels/optim",
    "benchmarks/common/models",
}


def name_of(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(root: Path, *folders: str) -> Iterator[tuple[str, str, str]]:
    """Where an import stands, the module it stands in, and what is imported: functions' own imports
    and those for type checkers too."""
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    files += [root / folder for folder in folders if folder.endswith(".py")]
    names = {name_of(file, root) for file in root.rglob("*.py")}
    for file in sorted(files):
        module = name_of(file, root)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inside = f"{'.' * node.level}{node.module or ''}"
                whole = [f"{inside}.{alias.name}" for alias in node.names]
                targets = [name if name in names else inside for name in whole]
            else:
                continue
            for target in targets:
                yield f"{file.relative_to(root)}:{node.lineno}", module, target


def row_of(module: str) -> int:
    """The row of the longest entry that names the module or a package around it."""
    name = module.removeprefix("neq_kernels.")
    found = {
        entry: row
        for row, entries in enumerate(ORDER)
        for entry in entries
        if f"{name}.".startswith(f"{entry}.")
    }
    if not found:
        raise LookupError(
            f"{module} has no place among the layers: add it to ORDER in tests/test_layer_rule.py "
            "and to the table in docs/architecture.md"
        )
    return found[max(found, key=len)]


def backend_of(module: str) -> str | None:
    folder = f"{PACKAGE}.backends."
    if not module.startswith(folder) or row_of(module) != ORDER.index(("backends",)):
        return None
    name = module.removeprefix(folder).split(".")[0]
    if name not in BASES:
        raise LookupError(f"backend {name}: add what it derives from to BASES in {__file__}")
    return name


def fault(module: str, target: str) -> str | None:
    """What is wrong with an import inside neq_kernels."""
    if target.startswith("."):
        return "is relative"
    if target.split(".")[0] != PACKAGE or module == PACKAGE:
        return None
    if target == PACKAGE:
        return None if module == f"{PACKAGE}.cli" else "is of the whole package"
    if row_of(target) > row_of(module):
        return "goes up"
    ours, theirs = backend_of(module), backend_of(target)
    if ours and theirs and theirs not in (ours, *BASES[ours]):
        return "is of a backend that is no base"
    return None


def faults(root: Path) -> list[str]:
    found = [(where, target, fault(name, target)) for where, name, target in imports(root, PACKAGE)]
    return [f"{where}: import of {target} {what}" for where, target, what in found if what]


def between_folders(root: Path) -> list[str]:
    """Imports from folders that ALLOWED does not name."""
    folders = (*ALLOWED, "tests")
    return [
        f"{where}: import of {target}"
        for folder, allowed in ALLOWED.items()
        for where, _, target in imports(root, folder)
        if target.split(".")[0] in folders and target.split(".")[0] not in allowed
    ]


def of_tests(root: Path) -> list[str]:
    """Imports from files of tests, but by tests that plant faults: they run other tests."""
    return [
        f"{where}: import of {target}"
        for where, name, target in imports(root, "tests")
        if re.fullmatch(r"tests\.(\w+\.)*test_\w+", target)
        and not name.endswith(".test_planted_faults")
    ]


def planted(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_every_import_goes_down() -> None:
    assert faults(ROOT) == []


def test_folders_import_from_no_other_folder_but_those_below() -> None:
    assert between_folders(ROOT) == []


def test_helpers_are_not_imported_from_tests() -> None:
    assert of_tests(ROOT) == []


def test_every_module_has_a_place() -> None:
    modules = {name_of(file, ROOT) for file in (ROOT / PACKAGE).rglob("*.py")} - {PACKAGE}
    assert {f"{PACKAGE}.channels", f"{PACKAGE}.cli"} <= modules
    for module in modules:
        row_of(module)
        backend_of(module)


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("channels.py", "from neq_kernels import layers", "neq_kernels.layers goes up"),
        ("channels.py", "import neq_kernels.layers.base as b", "neq_kernels.layers.base goes up"),
        (
            "channels.py",
            "def f():\n    from neq_kernels.layers.base import Layer",
            "neq_kernels.layers.base goes up",
        ),
        (
            "backends/problem.py",
            "from neq_kernels.backends.aten import linear",
            "neq_kernels.backends.aten goes up",
        ),
        ("layers/base.py", "import neq_kernels as neq", "neq_kernels is of the whole package"),
        ("layers/base.py", "from . import conv", ". is relative"),
        (
            "backends/triton/pack.py",
            "from neq_kernels.backends import cuda",
            "neq_kernels.backends.cuda is of a backend that is no base",
        ),
    ],
)
def test_a_planted_import_is_found(file: str, text: str, what: str, tmp_path: Path) -> None:
    right = {
        "layers/__init__.py": "",
        "layers/base.py": "from neq_kernels.backends import aten",
        "backends/aten.py": "from neq_kernels.backends import problem",
        "backends/cuda.py": "from neq_kernels.backends.aten import linear",
        "backends/problem.py": "import torch",
        "cli.py": "import neq_kernels",
    }
    files = {f"{PACKAGE}/{name}": content for name, content in {**right, file: text}.items()}
    (found,) = faults(planted(tmp_path, files))
    assert found.startswith(f"{PACKAGE}/{file}:")
    assert found.endswith(f": import of {what}")


def test_a_module_without_a_place_is_an_error(tmp_path: Path) -> None:
    files = {"layers/base.py": "import neq_kernels.tricks", "tricks.py": ""}
    planted(tmp_path / PACKAGE, files)
    with pytest.raises(LookupError, match=r"neq_kernels.tricks .* ORDER in tests/test_layer_rule"):
        faults(tmp_path)


def test_planted_imports_between_folders_are_found(tmp_path: Path) -> None:
    files = {
        "benchmarks/run.py": "from tests.support import nets",
        "examples/one.py": "import benchmarks.run",
        "neq_kernels/cli.py": "import examples.one",
        "setup.py": "import neq_kernels",
        "tests/test_a.py": "from tests import test_b",
        "tests/test_b.py": "from benchmarks import run",
        "tests/test_planted_faults.py": "from tests import test_b",
    }
    planted(tmp_path, files)
    found = [line.split(":")[0] for line in between_folders(tmp_path)]
    assert sorted(found) == sorted(list(files)[:4])
    assert of_tests(tmp_path) == ["tests/test_a.py:1: import of tests.test_b"]


def test_the_documented_order_is_this_one() -> None:
    """Of what there is: the order has places for modules to come."""

    def existing(rows: list[list[str]]) -> list[set[str]]:
        folder = ROOT / PACKAGE
        kept = [
            {name for name in row if (folder / name).is_dir() or (folder / f"{name}.py").is_file()}
            for row in rows
        ]
        return [row for row in kept if row]

    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.partition("## Layers of the package\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    shown = [re.findall(r"`([\w/]+)`", cell) for cell in reversed(cells)]
    assert existing(shown) == existing([[n.replace(".", "/") for n in row] for row in ORDER])


def test_packages_re_export_nothing() -> None:
    tops = [ROOT / name for name in ("neq_kernels", "benchmarks", "tests")]
    files = [file for top in tops for file in top.rglob("__init__.py")]
    full = {file.parent.relative_to(ROOT).as_posix() for file in files if file.stat().st_size}
    assert full <= RE_EXPORT
