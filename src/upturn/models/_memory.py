"""How much memory this process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")

SHARE_OF_FREE = {"cpu": 8, "cuda": 3}
"""What is kept to save work may take one part in so many of the memory that is free. A machine's is shared with others,
and little of it fits a CPU's caches; a CUDA device computes so fast that making things again shows."""


_OF_GRAPHS: WeakKeyDictionary[object, int] = WeakKeyDictionary()
"""Bytes that torch holds on a CUDA device, by whose graphs they are for."""


def may_keep(size: int, device: torch.device) -> bool:
    """Whether so many bytes may wait for the backward pass, instead of being made again."""
    return SHARE_OF_FREE.get(device.type, 1) * size <= free_on(device)


def free() -> int:
    """Bytes that are available now, of the machine or of the container (as cgroup v2 shows it within), whichever has
    fewer; 0 where nobody tells."""
    found: list[int] = []
    with suppress(OSError, StopIteration, ValueError):
        found.append(_value(MEMINFO, "MemAvailable:") * 2**10)
    with suppress(OSError, StopIteration, ValueError):  # "max" where there is no limit
        limit, taken = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(limit - taken + _value(GROUP / "memory.stat", "inactive_file"))
    return max(0, min(found, default=0))


def free_on(device: torch.device) -> int:
    """The same of a CUDA device: what nobody has taken, and what torch holds and does not use, less that of graphs."""
    if device.type != "cuda":
        return free()
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - sum(_OF_GRAPHS.values())
    return torch.cuda.mem_get_info(device)[0] + max(0, idle)


@contextmanager
def held_by(graphs: object, device: torch.device) -> Iterator[None]:
    """What torch takes inside is for graphs alone, as long as that object lives."""
    before = torch.cuda.memory_reserved(device)
    try:
        yield
    finally:
        _OF_GRAPHS[graphs] = _OF_GRAPHS.get(graphs, 0) + torch.cuda.memory_reserved(device) - before


def _value(file: Path, name: str) -> int:
    return int(next(line.split()[1] for line in file.read_text().splitlines() if line.startswith(f"{name} ")))
