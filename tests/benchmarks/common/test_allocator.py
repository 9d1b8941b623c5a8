"""Freed memory stays with the process when it is asked to."""

from __future__ import annotations

import platform
import subprocess
import sys

import torch

from benchmarks.overheads import freed_memory

PROGRAM = """
import resource, sys
from benchmarks.common import allocator
if sys.argv[1] == "kept":
    allocator.keep_freed_memory()
print(allocator.freed_memory())
megabyte = b"1" * 2**20
for _ in range(2):
    megabyte * 40
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    megabyte * 40
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(freed_memory):
    command = [sys.executable, "-c", PROGRAM, freed_memory]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    state, faults = finished.stdout.split()
    return state, int(faults)


def test_kept_memory_is_not_faulted_in_again():
    state, faults = run("kept")
    by_default, faults_by_default = run("returned")
    assert by_default == "returned"
    assert state == ("kept" if platform.libc_ver()[0] == "glibc" else "returned")
    if state == "kept":
        assert faults < 100 < faults_by_default


def test_a_sample_is_two_steps_and_their_page_faults():
    threads = torch.get_num_threads()
    ((dense, ours, faults),) = freed_memory.steps("mlp", "any", "returned", threads, 1)
    assert dense > 0
    assert ours > 0
    assert faults >= 0
