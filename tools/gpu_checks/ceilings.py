"""How long things take, what memory they need, and the two rates of the device that nothing can beat."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks._measure import peak_bytes
from gpu_checks.job import Job

Work = Callable[[], object]


def setup(job: Job) -> torch.device:
    """The device, with TF32 products as `protoseg` itself switches them on."""
    torch.manual_seed(0)
    if job.device == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    torch.cuda.init()
    return torch.device("cuda", 0)


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Work, device: torch.device, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of one call: by events on a GPU, by the clock elsewhere."""
    for _ in range(warmup):
        work()
    sync(device)
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    sync(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def peak_mb(work: Work, device: torch.device) -> float:
    """Largest memory of tensors alive during one call, in 10⁶ bytes beyond those alive before it."""
    return peak_bytes(work, device) / 1e6


def rates(job: Job, device: torch.device) -> dict[str, float]:
    """Measured: TFLOP/s of large products by type, and GB/s of a large copy (read and written)."""
    side, copied = (256, 2**20) if job.tiny else (8192, 2**30)
    found: dict[str, float] = {}
    kinds: tuple[tuple[str, torch.dtype, str], ...] = (
        ("bf16", torch.bfloat16, "high"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    )
    for name, dtype, precision in kinds:
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        ms = milliseconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, 5)  # type: ignore[misc]
        found[f"{name}_tflops"] = round(2 * side**3 / ms / 1e9, 2)
    torch.set_float32_matmul_precision("high")
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device, 5)
    found["copy_gb_per_s"] = round(2 * copied / ms / 1e6, 1)
    return found


def floor_ms(flops: float, num_bytes: float, product: str, measured: dict[str, float]) -> float:
    """The larger of the two times that the device needs at its measured rates; `product`: bf16 or tf32."""
    arithmetic = flops / measured[f"{product}_tflops"] / 1e9
    return max(arithmetic, num_bytes / measured["copy_gb_per_s"] / 1e6)


def about(device: torch.device) -> dict[str, Any]:
    """The device and what runs on it."""
    from protoseg.training.log import environment

    found: dict[str, Any] = environment(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found
