"""The machine and the versions of a measurement."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pillow", "tokenizers", "open_clip_torch", "simplejpeg", "faiss-cpu",
    "sentence-transformers",
)  # fmt: skip
"""Packages whose versions are recorded; None if not installed."""


def machine() -> dict[str, object]:
    """Return date, processor, threads, load and versions."""
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
    """Return the package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Return the accelerator's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor() -> str:
    """Return the processor's name on Linux, else its architecture."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
