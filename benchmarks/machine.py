"""What a figure was measured on."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def describe() -> str:
    """One line: processor, threads, versions."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    packages = ("torch", "pytorch-lightning", "tensorboard", "matplotlib")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{cpu}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"
