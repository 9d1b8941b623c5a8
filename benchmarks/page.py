"""Small pieces of one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["definitions", "escape", "facts", "figure", "html", "table"]

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
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); padding: 10px 12px; line-height: 1.25;
  vertical-align: bottom; border-bottom: 1px solid var(--line); }
td { text-align: right; padding: 9px 12px; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; font-weight: 600; color: var(--ink); }
figure { margin: 20px 0 28px; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 18px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--soft); font-size: 14px; margin-top: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; font-size: 14px; }
dt { font-weight: 600; }
dd { margin: 0; color: #374151; }
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


def table(headings: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """Text cells under headings; the first column names the row."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings.values())
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def figure(path: Path, caption: str) -> str:
    """A PNG, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def definitions(terms: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in terms.items())
    return f"<h2>How to read the figures</h2>\n<dl>{items}</dl>"


def facts(environment: Mapping[str, Any]) -> str:
    """One line about the machine and the versions."""
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v)
    gpu = environment["gpu"] or "no GPU"
    return (
        "<footer>"
        + escape(
            f"{environment['date']} · {environment['processor']}, {environment['cores']} cores, "
            f"{environment['torch_threads']} PyTorch threads, {environment['capability']}, {gpu} · "
            f"{environment['system']} · Python {environment['python']} · {versions}"
        )
        + "</footer>"
    )
