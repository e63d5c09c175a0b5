"""How long things take, how much memory they need, and the rates that no program on this machine can beat."""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from protoseg.runtime.memory import peak_memory_gb

RATE_SECONDS = 0.3  # of one measurement of a rate


def machine(device: torch.device) -> str:
    """Its name and how much of it is used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = {
        key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)
    }
    name = found.get("model name") or platform.processor()
    numbers = [f"{word} {found[key]}" for word, key in (("family", "cpu family"), ("model", "model"))]
    units = [
        word for word in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if word in found.get("flags", "")
    ]
    return f"{name} ({', '.join([*numbers, *units])}), {torch.get_num_threads()} threads"


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternating(
    works: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every call of each, one after the other, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(warmup + repeats):
        for name, work in works.items():
            taken = timed(work, device)
            if repeat >= warmup:
                seconds[name].append(taken)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of each repeat: what else the machine does hits both parts of it."""
    return statistics.median(a / b for a, b in zip(above, below))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest sum of tensors alive at a time during one call, beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as prof:
        function()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def memory_now_gb(device: torch.device) -> float:
    """Memory that is in use: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    statm = Path("/proc/self/statm")
    if sys.platform == "linux":
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    return peak_memory_gb(device)  # it has only grown so far


def _per_second(work: Callable[[], object], amount: float) -> float:
    """The best of many calls: a rate is what the machine can do, not what it does on average."""
    work()
    best, end = 0.0, time.perf_counter() + RATE_SECONDS
    while time.perf_counter() < end:
        best = max(best, amount / timed(work, torch.device("cpu")))
    return best


@cache
def product_rate(rows: int, inner: int, columns: int, precision: str = "fp32") -> float:
    """Floating-point operations per second of one matrix product (rows × inner) · (inner × columns)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    return _per_second(lambda: torch.mm(a, b.t(), out=out), 2 * rows * inner * columns)


@cache
def copy_rate() -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source, target = torch.ones(2**26), torch.empty(2**26)
    return _per_second(lambda: target.copy_(source), 8 * 2**26)


@cache
def exp_rate() -> float:
    """Exponentials per second of numbers that the cache holds."""
    values = torch.zeros(2**16)
    return _per_second(values.exp, len(values))
