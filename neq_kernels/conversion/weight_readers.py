"""Find out, from its source, which layers' weights a module reads instead of calling the layers."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils import checkpoint

from neq_kernels.layers.base import NeuronLayer
from neq_kernels.layers.weight_reads import READ, WeightReads

# What is asked of a tensor without reading its values.
_ABOUT = {"data", "device", "dim", "dtype", "grad", "is_cuda", "is_meta", "ndim", "numel"}
_ABOUT |= {"requires_grad", "shape", "size", "stride"}
_CHECKPOINTS = {"checkpoint", "_gradient_checkpointing_func"}
# Reads weights for a fast path where nothing learns, and leaves it when it sees a hook.
_READS_WITHOUT_LEARNING = (nn.TransformerEncoderLayer,)


def prepare_readers(model: nn.Module) -> None:
    """Let every module of ``model`` that reads a neuron layer's weight see its neurons."""
    for module in model.modules():
        remove_reads(module)
        if isinstance(module, (NeuronLayer, *_READS_WITHOUT_LEARNING)):
            continue
        paths = [p for p in layers_read(type(module)) if _is_neuron_layer(module, p)]
        arguments = arguments_read(type(module))
        if paths or arguments:
            module.__dict__["neq_weight_reads"] = WeightReads(module, paths, arguments)


def remove_reads(module: nn.Module) -> None:
    """Undo :func:`prepare_readers` for one module."""
    reads = module.__dict__.pop("neq_weight_reads", None)
    if reads is not None:
        reads.remove(module)


_known: WeakKeyDictionary[type[nn.Module], tuple[str, ...]] = WeakKeyDictionary()


def layers_read(kind: type[nn.Module]) -> tuple[str, ...]:
    """The submodules, by dotted name, whose weight or bias the class reads in its forward, or in
    methods that this calls. None are found where Python has no source."""
    if kind not in _known:
        _known[kind] = tuple(_find(kind))
    return _known[kind]


_known_arguments: WeakKeyDictionary[type[nn.Module], dict[str, int]] = WeakKeyDictionary()


def arguments_read(kind: type[nn.Module]) -> dict[str, int]:
    """The arguments of its forward whose weight or bias the class reads there, by position: layers
    that are handed to it."""
    if kind not in _known_arguments:
        forward = next(_definitions(kind, "forward"), None)
        _known_arguments[kind] = {} if forward is None else _find_arguments(forward)
    return _known_arguments[kind]


def _find_arguments(forward: FunctionType) -> dict[str, int]:
    tree, code = _tree(forward), forward.__code__
    if tree is None:
        return {}
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    read = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr in READ
        and _reads_values(node, parents[node])
    }
    return {name: position for position, name in enumerate(names) if name in read}


def checkpoints_inside(kind: type[nn.Module]) -> bool:
    """Whether a method of the class calls a checkpoint: a recomputation runs without the forward
    around it."""
    functions = (
        inspect.unwrap(member)
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for member in vars(base).values()
        if isinstance(member, FunctionType)
    )
    return any(
        name in _CHECKPOINTS or function.__globals__.get(name) is checkpoint.checkpoint
        for function in functions
        for name in function.__code__.co_names
    )


def _find(kind: type[nn.Module]) -> dict[str, None]:
    found: dict[str, None] = {}
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        for function in _definitions(kind, name):
            reads, methods = _read_by(function)
            found |= dict.fromkeys(reads)
            waiting += methods - seen
            seen |= methods
    return found


def _definitions(kind: type[nn.Module], name: str) -> Iterator[FunctionType]:
    """Every definition of a method that the class has, with those it inherits: it may call them."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        member = base.__dict__.get(name)
        if isinstance(member, property):
            member = member.fget
        member = inspect.unwrap(member) if callable(member) else None
        if isinstance(member, FunctionType):
            yield member


def _read_by(function: FunctionType) -> tuple[frozenset[str], frozenset[str]]:
    """The submodules whose weight it reads, and the names of ``self`` that may be methods."""
    tree = _tree(function)
    if tree is None:
        return frozenset(), frozenset()
    itself = function.__code__.co_varnames[:1]
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    reads, names = set(), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Call):  # super().forward
            names.add(node.attr)
        path = _path(node)
        if path is None or (path[0],) != itself:
            continue
        names.add(path[1])
        if len(path) > 2 and path[-1] in READ and _reads_values(node, parents[node]):
            reads.add(".".join(path[1:-1]))
    return frozenset(reads), frozenset(names)


def _tree(function: FunctionType) -> ast.AST | None:
    """None where Python has no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _path(node: ast.expr) -> list[str] | None:
    """``["self", "a", "weight"]`` of ``self.a.weight``."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


def _reads_values(node: ast.Attribute, parent: ast.AST) -> bool:
    if not isinstance(node.ctx, ast.Load):
        return False
    if isinstance(parent, ast.Attribute) and parent.attr in _ABOUT:
        return False
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id not in ("isinstance", "hasattr", "getattr")
    return not isinstance(parent, ast.Compare)


def _is_neuron_layer(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), NeuronLayer)
    except AttributeError:
        return False
