"""What a row was run on. Nothing here imports torch: versions come from package metadata, GPUs from NVML."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from bench.record import Provenance
from bench.resources import ROOT

PACKAGES = ("torch", "timm", "torchvision", "accelerate", "peft", "torchmetrics", "numpy")
CPU = "cpu"


def describe(device: str, device_name: str = "") -> Provenance:
    """What can be known before a cell runs. `device` is "cpu" or a GPU's slug, `device_name` the GPU's own name."""
    kind = "cpu" if device == CPU else "cuda"
    driver, cuda = (None, None) if kind == "cpu" else driver_versions()
    commit, dirty = git_state()
    return Provenance(
        device=kind,
        device_name=device_name or cpu_name(),
        driver=driver,
        cuda=cuda,
        cores=usable_cores(),
        memory_gib=round(total_memory() / 2**30, 1),
        load_before=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        platform=platform.platform(terse=True),
        python=platform.python_version(),
        packages=package_versions(),
        commit=commit,
        dirty=dirty,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def usable_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name, or the machine type where the system does not tell."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def total_memory() -> int:
    """Bytes of main memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def driver_versions() -> tuple[str | None, str | None]:
    """(driver, highest CUDA version it serves) by NVML; (None, None) where NVML does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetCudaDriverVersion()
        return str(pynvml.nvmlSystemGetDriverVersion()), f"{version // 1000}.{version % 1000 // 10}"
    except pynvml.NVMLError:
        return None, None


def slug(name: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the source tree, and whether it holds code or cards beyond it, a new method's file included.

    Without a repository, as in a copy of the tree or an installed package: what BENCH_COMMIT names, and None.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("BENCH_COMMIT") or None, None
    try:
        commit, status = (
            subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, timeout=10, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "bench", "methods", "datasets"])
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit.strip(), bool(status.strip())
