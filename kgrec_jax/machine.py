"""What the machine at hand is: threads, and the memory that this process has used."""

from __future__ import annotations

import os
import pathlib
import sys


def cpu_threads() -> int:
    """Processor threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_mb() -> float:
    """Peak memory of this process so far in MB: of the device where it tells, else resident."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    status = pathlib.Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count what the parent held when it started this process
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
