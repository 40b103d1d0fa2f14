"""What peers measure with and how they answer. It stands beside their scripts, whose interpreters lack this package."""

import json
import time


def clocks():
    """Seconds on the wall, and processor seconds of all threads of this process."""
    return time.perf_counter(), time.process_time()


def since(began):
    """What both clocks have run since."""
    wall, processor = clocks()
    return {"seconds": wall - began[0], "cpu_s": processor - began[1]}


def peak_mb():
    """Peak resident memory of this process in MB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:"))


def say(answer):
    """One line of JSON on the standard output, at once."""
    print(json.dumps(answer), flush=True)
