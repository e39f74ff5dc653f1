"""Memory that a stage freed does not weigh on the next one; what is free, as the machine or the container says."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upturn.models import _memory

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


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 3000 * 2**10), (str(2**21), 2**20), (str(2**19), 0), (None, 3000 * 2**10)]
)
def test_free_memory_is_that_of_the_tighter_bound(
    limit: str | None, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    3000 kB\n")
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{2**20 + 4096}\n")
        (tmp_path / "memory.stat").write_text("active_file 99\ninactive_file 4096\n")  # it goes when it must
    monkeypatch.setattr(_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(_memory, "GROUP", tmp_path)
    assert _memory.free() == free


def test_what_is_held_for_graphs_is_free_for_nobody_else(monkeypatch: pytest.MonkeyPatch):
    class Graphs:
        pass

    device, reserved = torch.device("cuda"), [300]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved[0])
    assert _memory.free_on(device) == 1200
    graphs = Graphs()
    for more in (40, 60):
        with _memory.held_by(graphs, device):
            reserved[0] += more
    assert _memory.free_on(device) == 1200
    with pytest.raises(RuntimeError), _memory.held_by(graphs, device):
        reserved[0] += 150
        raise RuntimeError("nothing more")
    assert _memory.free_on(device) == 1200
    del graphs
    assert _memory.free_on(device) == 1450, "torch may give it to anybody"


def test_where_nobody_tells_no_memory_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(_memory, "GROUP", tmp_path)
    assert _memory.free() == 0
