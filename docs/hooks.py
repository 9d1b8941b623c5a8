"""What the site needs beyond Markdown: the committed results, and docstrings without Sphinx roles.

Pages link to ``../benchmarks/results/...``, which is right in a checkout and where the code is
hosted. The site gets these files beside its pages, and links that fit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results/"
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(<code>)~?")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path in sorted((ROOT / RESULTS).rglob("*.*")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(f"](../{RESULTS}", f"]({RESULTS}")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub(r"\1", html)
