"""Memory that a stage freed does not weigh on the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREED = """
from pathlib import Path
import torch
from upturn.lab._memory import give_back, keep_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256  # MiB: pages of 4 KiB

keep_freed()
blocks = [torch.ones(2**20) for _ in range(200)]
last = torch.ones(2**20)  # above the others: the heap cannot shrink from its end
full = resident()
del blocks
kept = resident()
give_back()
print(full, kept, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep and give back")
def test_freed_pages_are_kept_until_they_are_given_back():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    full, kept, left = map(int, done.stdout.split())
    assert full - kept < 100
    assert full - left > 700
