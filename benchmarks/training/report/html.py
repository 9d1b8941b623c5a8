"""Small pieces of one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Protocol

from benchmarks.common import records

__all__ = ["escape", "facts", "figure", "html", "table"]

_STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --accent: #0f766e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 44px 0 8px; padding-top: 20px; border-top: 1px solid var(--line); }
p { max-width: 76ch; margin: 8px 0; }
.verdict { border-left: 4px solid var(--accent); background: #fff; padding: 12px 16px;
  margin: 16px 0; border-radius: 0 8px 8px 0; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  margin: 16px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px;
  font-variant-numeric: tabular-nums; }
thead th { text-align: right; color: var(--soft); padding: 12px 18px; }
thead th:first-child { width: 46%; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { text-align: left; font-weight: 600; padding: 8px 18px; line-height: 1.35; }
tbody th small { display: block; font-weight: 400; font-size: 12.5px; color: var(--soft); }
td { text-align: right; padding: 8px 18px; vertical-align: top; }
tr.part { border-top: 0; }
tr.part th { font-weight: 400; padding: 1px 18px 6px 34px; color: #374151; }
tr.part td { padding-top: 1px; padding-bottom: 6px; color: #374151; }
figure { margin: 20px 0 28px; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 18px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--soft); font-size: 14px; margin-top: 12px; }
footer { color: var(--soft); font-size: 13px; margin-top: 36px; }
"""


def html(title: str, body: Sequence[str]) -> str:
    """A whole page; ``body`` holds HTML."""
    content = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{content}\n</main>\n</body>\n</html>\n"
    )


class Line(Protocol):
    """What names a line of a table: ``name`` and a ``note`` that explains it. A name in lower case
    belongs to the line above."""

    @property
    def name(self) -> str: ...
    @property
    def note(self) -> str: ...


def table(columns: Sequence[str], lines: Sequence[tuple[Line, Sequence[str]]]) -> str:
    """One line per quantity, one column per run."""
    head = "<th></th>" + "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = []
    for line, cells in lines:
        kind = ' class="part"' if line.name[0].islower() else ""
        note = f"<small>{escape(line.note)}</small>" if line.note else ""
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f"<tr{kind}><th>{escape(line.name)}{note}</th>{values}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(body)
        + "</tbody></table></div>"
    )


def figure(path: Path, caption: str) -> str:
    """A PNG, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def facts(machine: Mapping[str, Any]) -> str:
    """:func:`benchmarks.common.records.facts` at the foot of a page."""
    return f"<footer>{escape(records.facts(machine))}</footer>"
