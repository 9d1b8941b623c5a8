"""The list of models, ``models.txt``: one line each, nothing is left out silently."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("models.txt")
LIBRARIES = ("torchvision", "timm", "transformers", "diffusers")


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        library: one of :data:`LIBRARIES`.
        family: the module (torchvision, timm, diffusers) or model type (transformers) it is of.
        name: by which the library builds it; unique in the library.
        input: a shape, or the name of a kind of input.
        options: of its constructor or config; nested where a sub-config is meant.
        in_ci: whether it is one of those that CI runs.
        section: the heading of the list that it stands below.
    """

    library: str
    family: str
    name: str
    input: str
    options: dict[str, Any]
    in_ci: bool = False
    section: str = ""

    @property
    def id(self) -> str:
        return f"{self.library}/{self.name}"


def entries(path: Path = LIST) -> list[Entry]:
    """Every line of the list.

    Raises:
        ValueError: a line that cannot be read, or a model that is there twice.
    """
    found: list[Entry] = []
    section = ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0].startswith("["):
            section = " ".join(words).strip("[]")
            continue
        try:
            found.append(_entry(words, section))
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from error
    twice = {entry.id for entry in found if [each.id for each in found].count(entry.id) > 1}
    if twice:
        raise ValueError(f"{path.name}: expected each model once, got {sorted(twice)} again")
    return found


def chosen(names: Sequence[str] | None, ci: bool, everything: Sequence[Entry]) -> list[Entry]:
    """Those whose name, family, library or id is asked for; all by default.

    Raises:
        ValueError: a name that fits none.
    """
    some = [entry for entry in everything if entry.in_ci or not ci]
    if names is None:
        return some
    missing = [name for name in names if not any(_fits(name, entry) for entry in some)]
    if missing:
        raise ValueError(
            f"--only: expected models, families or libraries of the list, got {missing}"
        )
    return [entry for entry in some if any(_fits(name, entry) for name in names)]


def _fits(name: str, entry: Entry) -> bool:
    return name in (entry.name, entry.family, entry.library, entry.id)


def _entry(words: list[str], section: str) -> Entry:
    if len(words) < 4 or words[0] not in LIBRARIES:
        raise ValueError(
            f"expected 'LIBRARY FAMILY NAME INPUT [KEY=VALUE ...] [ci]', library of {LIBRARIES}, "
            f"got {' '.join(words)!r}"
        )
    library, family, name, input, *rest = words
    in_ci = "ci" in rest
    options: dict[str, Any] = {}
    for key, value in _pairs(word for word in rest if word != "ci"):
        place = options
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return Entry(library, family, name, input, options, in_ci, section)


def _pairs(words: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE with a JSON value, got {word!r}")
        yield key, json.loads(value)
