"""How much memory this process may still take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def free() -> int:
    """Bytes that are available now, of the machine or of the container, whichever has fewer; 0 where nobody tells."""
    found: list[int] = []
    with suppress(OSError, StopIteration, ValueError):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 2**10)
    with suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(int((GROUP / "memory.max").read_text()) - int((GROUP / "memory.current").read_text()))
    return max(0, min(found, default=0))
