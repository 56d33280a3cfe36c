"""Keep freed memory for the next step on a CPU.

glibc returns blocks over 32 MB to the system at every free and gets zeroed pages back at the next allocation. A
training step allocates the same large tensors again and again, and page faults can take a third of it.
"""

from __future__ import annotations

import ctypes
import logging
import platform

log = logging.getLogger("llm_mlp.train")


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for this process; False where there is no glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX = 0: large blocks come from the heap; M_TRIM_THRESHOLD: the heap is not given back.
        done = bool(libc.mallopt(-4, 0)) and bool(libc.mallopt(-1, 2**31 - 1))
    except (OSError, AttributeError):
        return False
    if not done:
        log.info("glibc refused to keep freed memory; large allocations stay slower")
    return done
