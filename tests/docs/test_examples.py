from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

EXAMPLES = {
    "five_lines.py": ["--epochs", "3", "--images", "100"],
    "new_tokens.py": ["--before", "2", "--epochs", "2"],
    "continue_training.py": ["--before", "1", "--epochs", "3", "--images", "200"],
}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_example_is_run_here() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(EXAMPLES)


def test_five_lines_trains_and_tells_what_is_frozen() -> None:
    done = run("five_lines.py", *EXAMPLES["five_lines.py"])
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    frozen = re.findall(r"([\d]+)% of 106 neurons frozen", done.stdout)
    assert len(frozen) == 3


def test_continued_training_freezes_and_prints_both() -> None:
    done = run("continue_training.py", *EXAMPLES["continue_training.py"])
    assert done.returncode == 0, done.stderr
    shares = [float(s) for s in re.findall(r"^\d+ \| ([\d.]+)%", done.stdout, re.M)]
    assert len(shares) == 3
    assert shares[0] == 0
    assert shares[-1] > 0
    assert re.search(r"^dense: accuracy [\d.]+%", done.stdout, re.M)
    assert re.search(r"^neq: accuracy [\d.]+%", done.stdout, re.M)


def test_only_the_new_token_is_trained() -> None:
    done = run("new_tokens.py", *EXAMPLES["new_tokens.py"])
    assert done.returncode == 0, done.stderr
    before, after = (float(loss) for loss in re.findall(r"trained: loss ([\d.]+)", done.stdout))
    assert after < before
    assert re.search(r"^1 of \d+ rows moved$", done.stdout, re.M)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_wrong_argument_is_named(name: str) -> None:
    done = run(name, "--epochs", "0")
    assert done.returncode == 2
    assert "--epochs: expected a whole number above 0, got '0'" in done.stderr
