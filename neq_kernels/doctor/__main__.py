"""Run every check and print each result as a line of JSON; an argument is the index of a GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from neq_kernels.doctor.runner import run

if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.cuda.set_device(int(sys.argv[1]))
    for check in run():
        print(json.dumps(asdict(check)), flush=True)
