"""Which names the sources read from the environment, by reading the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Constants = Mapping[str, Mapping[str, str]]


def names_in_python(sources: Mapping[str, str]) -> set[str]:
    """The names that Python modules read.

    Args:
        sources: text by module name, such as ``dispatch`` or ``cpu``.

    Raises:
        ValueError: a name that is computed, so that nobody can tell what it is.
    """
    trees = {module: ast.parse(text) for module, text in sources.items()}
    constants = {module: dict(_constants(tree)) for module, tree in trees.items()}
    for module, tree in trees.items():
        constants[module] |= dict(_imported(tree, constants))
    found: set[str] = set()
    for module, tree in trees.items():
        loops = _literal_loops(tree)
        for node in ast.walk(tree):
            key = _key(node)
            if key is None:
                continue
            names = _values(key, module, constants, loops)
            if not names:
                raise ValueError(
                    f"{module}, line {key.lineno}: expected a string or the name of a constant, "
                    f"got {ast.unparse(key)}"
                )
            found |= names
    return found


def names_in_cpp(texts: Iterable[str]) -> set[str]:
    """The names that C++ sources read."""
    return {name for text in texts for name in re.findall(r'\bgetenv\(\s*"(\w+)"', text)}


def names_in_table(page: str) -> list[str]:
    """The first column of the page's table."""
    return re.findall(r"^\| `(\w+)` \|", page, re.M)


def python_sources(root: Path) -> dict[str, str]:
    """Of the package and setup.py, by the last part of the module's name; one of a name that
    several modules have is told apart by its folder."""
    files = [*sorted((root / "neq_kernels").rglob("*.py")), root / "setup.py"]
    sources: dict[str, str] = {}
    for file in files:
        short = file.parent.name if file.name == "__init__.py" else file.stem
        name = short if short not in sources else f"{file.parent.name}/{short}"
        sources[name] = file.read_text()
    return sources


def _key(node: ast.AST) -> ast.expr | None:
    """What is looked up, where ``node`` reads the environment; writes are reads too here: a name
    that is set for a child process is one that something reads."""
    if isinstance(node, ast.Subscript) and _is_environ(node.value):
        return node.slice
    if isinstance(node, ast.Compare) and any(map(_is_environ, node.comparators)):
        return node.left
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        of_environ = _is_environ(node.func.value) and node.func.attr != "update"
        if of_environ or ast.unparse(node.func) in ("os.getenv", "os.putenv"):
            return node.args[0]
    return None


def _is_environ(node: ast.expr) -> bool:
    return ast.unparse(node) in ("os.environ", "environ")


def _values(
    key: ast.expr, module: str, constants: Constants, loops: Mapping[str, set[str]]
) -> set[str]:
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        return {key.value}
    if isinstance(key, ast.Name):
        own = constants[module].get(key.id)
        return loops.get(key.id, set()) if own is None else {own}
    if isinstance(key, ast.Attribute):
        owner = ast.unparse(key.value).rpartition(".")[2]
        value = constants.get(owner, {}).get(key.attr)
        return set() if value is None else {value}
    return set()


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value))):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(value))):
                yield name, value


def _imported(tree: ast.Module, constants: Constants) -> Iterator[tuple[str, str]]:
    """Constants of other modules that this one imports by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            known = constants.get(node.module.rpartition(".")[2], {})
            for alias in node.names:
                if alias.name in known:
                    yield alias.asname or alias.name, known[alias.name]


def _literal_loops(tree: ast.Module) -> dict[str, set[str]]:
    """Loop variables that run over strings that are written there."""
    loops: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        match node:
            case (
                ast.For(target=ast.Name(id=name), iter=ast.Tuple(elts=elements))
                | ast.comprehension(target=ast.Name(id=name), iter=ast.Tuple(elts=elements))
            ):
                strings = {e.value for e in elements if isinstance(e, ast.Constant)}
                loops.setdefault(name, set()).update(map(str, strings))
    return loops
