"""What a measurement depends on, and the memory that is free and used. Linux tells most of it."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pillow", "tokenizers", "open_clip_torch", "x-clip", "lightly",
    "textaugment", "nltk", "simplejpeg", "faiss-cpu", "sentence-transformers",
)  # fmt: skip
"""Ours and the peers'; None where one is not installed."""


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str | None:
    """The package's version, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, where Linux tells it."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory(field: str) -> float:
    """A field of /proc/self/status in 10⁶ bytes: VmHWM (the most ever resident), RssAnon (a process's own), VmRSS.

    VmHWM begins anew with a program; `ru_maxrss` would begin at the size of the process that started it. 0 where the
    system is not Linux.
    """
    return _kilobytes("/proc/self/status", field) * 1024 / 1e6


def forget_peak() -> None:
    """Let VmHWM begin anew at what is resident now; nothing where the system is not Linux."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def free_memory() -> float:
    """Bytes that can be had without swapping; 0 where the system is not Linux."""
    return _kilobytes("/proc/meminfo", "MemAvailable") * 1024.0


def _kilobytes(path: str, field: str) -> int:
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields.get(field, "0").split()[0])
