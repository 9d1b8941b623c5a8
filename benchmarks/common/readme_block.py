"""A block of a page that a command writes, between two marker lines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.files import ROOT, replace_file

RESULTS_PAGE = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Block:
    """The lines of ``page`` between ``<!-- NAME: begin ... -->`` and ``<!-- NAME: end -->``.

    Attributes:
        name: of the block, unique on its page.
        command: what writes it.
        page: a Markdown file that holds both markers.
    """

    name: str
    command: str
    page: Path = RESULTS_PAGE

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: begin (written by {self.command}) -->\n"

    @property
    def end(self) -> str:
        return f"<!-- {self.name}: end -->\n"

    def link(self, path: Path) -> str:
        """``path`` as a target of a link on the page."""
        return Path(os.path.relpath(path, self.page.parent)).as_posix()

    def text(self) -> str:
        """What stands between the markers.

        Raises:
            ValueError: the page lacks one of the markers.
        """
        return self._parts()[1]

    def write(self, text: str) -> None:
        """Put ``text`` between the markers; the page is replaced whole.

        Raises:
            ValueError: the page lacks one of the markers.
        """
        before, _, after = self._parts()
        replace_file(self.page, (before + self.begin + text + self.end + after).encode())

    def _parts(self) -> tuple[str, str, str]:
        before, begin, rest = self.page.read_text().partition(self.begin)
        text, end, after = rest.partition(self.end)
        if not begin or not end:
            raise ValueError(
                f"{self.page}: expected the lines {self.begin.strip()!r} and {self.end.strip()!r}"
            )
        return before, text, after
