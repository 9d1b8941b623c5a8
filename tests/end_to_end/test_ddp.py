"""Two processes under torchrun (gloo) against one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "support" / "ddp_worker.py"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--others", "follow", "--bucket-view"],
        ["--optimizer", "AdamW", "--others", "follow"],
        ["--compile"],
        ["--static-graph"],
    ],
    ids=" ".join,
)
def test_two_processes_train_as_one(options: list[str]) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(WORKER), *options),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
