"""Measure variants of one job against each other in one process."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import dora_mlx  # isort: skip  # loads OpenBLAS before MLX
import mlx.core as mx


@dataclass
class Measurement:
    """Medians over repetitions, and the peak above what was resident before the job.

    ``tokens`` is how many a job generates, if it does.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    tokens: int | None = None


def on_cpu() -> bool:
    """Whether MLX computes on the CPU here."""
    return mx.default_device().type == mx.DeviceType.cpu


def measure(jobs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, Measurement]:
    """Run every job ``repetitions`` times, interleaved, and once more for its peak memory.

    A job returns the arrays to evaluate. On a shared machine only ratios within one call mean
    something; on the CPU use the processor's time, which other programs disturb least.
    """
    peaks = {name: _peak(job) for name, job in jobs.items()}
    wall: dict[str, list[float]] = {name: [] for name in jobs}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repetitions):
        for name, job in jobs.items():
            started, processor = time.perf_counter(), time.process_time()
            mx.eval(job())
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - processor)
    return {
        name: Measurement(statistics.median(wall[name]), statistics.median(cpu[name]), peaks[name])
        for name in jobs
    }


def _peak(job: Callable[[], object]) -> int:
    """Peak memory of ``job`` above what is resident, in bytes; also its warm-up."""
    mx.eval(job())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    # With memory to spare the CPU backend runs up to ten tasks ahead of what is needed.
    limit = mx.set_memory_limit(before + 2**20)
    mx.reset_peak_memory()
    mx.eval(job())
    mx.set_memory_limit(limit)
    return mx.get_peak_memory() - before


def environment() -> dict[str, str]:
    """What the numbers belong to: device, BLAS and versions."""
    device = "CPU" if on_cpu() else str(mx.device_info().get("device_name", "GPU"))
    return {
        "device": f"{device} ({_processor()})" if on_cpu() else device,
        "blas": "not used" if not on_cpu() else dora_mlx.blas_notice or _blas(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{package: version(package) for package in ("mlx", "mlx-lm")},
        "dora-mlx": dora_mlx.__version__,
    }


def _processor() -> str:
    if platform.system() != "Linux":
        return platform.processor()
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _blas() -> str:
    return "OpenBLAS" if platform.system() == "Linux" else "Accelerate"


def table(
    title: str, rows: dict[str, Measurement], reference: str, peak: str = "extra peak"
) -> str:
    """A Markdown table of ratios to the row ``reference``; times are the processor's on a CPU."""
    base = rows[reference]
    time_of = (lambda m: m.cpu_s) if on_cpu() else (lambda m: m.wall_s)
    lines = [
        f"\n{title}\n",
        f"| variant | time | ratio | {peak} | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        taken = f"{time_of(row) * 1e3:.1f} ms"
        if row.tokens:
            taken += f" ({row.tokens / time_of(row):.1f} tokens/s)"
        lines.append(
            f"| {name} | {taken} | {time_of(row) / time_of(base):.2f} "
            f"| {row.peak_bytes / 2**20:.1f} MiB | {row.peak_bytes / base.peak_bytes:.2f} |"
        )
    return "\n".join(lines)
