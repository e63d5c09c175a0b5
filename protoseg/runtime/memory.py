"""Memory: how much there is, and how much was used."""

import math
import re
import resource
import sys
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> float:
    """What can still be taken: of the GPU, or of this machine or container; infinity where nobody says."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    known = [math.inf]
    machine = re.search(r"MemAvailable:\s+(\d+)", _text("/proc/meminfo"))
    if machine:
        known.append(1024 * int(machine[1]))
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    cache = re.search(r"inactive_file (\d+)", _text("/sys/fs/cgroup/memory.stat"))
    if limit.isdecimal() and used.isdecimal() and cache:  # of a container; its file cache gives way
        known.append(int(limit) - int(used) + int(cache[1]))
    return min(known)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
