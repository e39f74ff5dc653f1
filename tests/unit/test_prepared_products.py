"""What torch keeps of products that it prepared does not grow with the number of shapes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from upturn.models.native import ops

PROGRAM = """
import ctypes, torch
import upturn.models

class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap
right = torch.randn(256, 256, dtype=torch.bfloat16)
for size in range(300, 500):
    torch.randn(size, 256, dtype=torch.bfloat16) @ right
    if size == 400:
        before = heap().uordblks
print(heap().uordblks - before)
"""


@pytest.mark.skipif(not ops.onednn_has_bf16(), reason="torch does not hand such products to oneDNN here")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc tells how much is in use")
def test_a_hundred_more_shapes_take_nothing_more():
    own = {name: value for name, value in os.environ.items() if not name.endswith("_CAPACITY")}  # set by this process
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=own)
    assert int(done.stdout) < 2**21
