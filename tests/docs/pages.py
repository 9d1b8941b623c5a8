"""The documents, and what they refer to."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
DOCUMENTS = [*OTHERS, *SITE]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def own_words(page: Path) -> str:
    """Without the blocks that commands have written, whose words are of their time."""
    return re.sub(r"<!-- (\w+): begin.*?<!-- \1: end -->", "", page.read_text(), flags=re.S)


def local_links(text: str) -> list[str]:
    """Targets of links and pictures within the repository, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.partition("#")[0] for t in targets if not t.startswith(("http", "#"))]


def modules(text: str) -> set[str]:
    """What is run by ``python -m``, of this repository."""
    found = re.findall(r"python -m ([\w.]+)", text)
    return {name for name in found if name.split(".")[0] in ("benchmarks", "tests", "neq_kernels")}


def paths(text: str) -> set[str]:
    """Files of this repository that are named in code font."""
    roots = "neq_kernels|benchmarks|tests|csrc|examples|docs"
    return set(re.findall(rf"`((?:{roots})/[\w/.]+\.\w+)`", text))
