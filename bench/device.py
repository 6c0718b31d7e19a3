"""The device that figures are taken on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from bench.errors import BenchError
from bench.measure import provenance


@dataclass(frozen=True)
class Device:
    slug: str  # "cpu", or the GPU's name
    name: str = ""
    index: int = 0
    uuid: str = ""


def resolve_device(device: str, precision: str) -> Device:
    """`auto|cpu|cuda|cuda:N` -> where the cells will run. Raises BenchError for what this machine does not have.

    CUDA is asked in a short-lived process, so that this one never holds memory on the GPU that it measures.
    """
    match = re.fullmatch(r"(auto|cpu|cuda)(?::(\d+))?", device)
    if not match or (match[2] and match[1] != "cuda"):
        raise BenchError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N")
    index = int(match[2] or 0)
    gpus = [] if match[1] == "cpu" else _cuda_devices()
    if match[1] == "cuda" and index >= len(gpus):
        found = f"{len(gpus)} CUDA device{'s' if len(gpus) != 1 else ''}" if gpus else "no CUDA device"
        raise BenchError(f"--device {device}: torch finds {found} on this machine; use --device cpu")
    if not gpus:
        if precision in ("fp16", "tf32"):
            raise BenchError(f"--precision {precision} needs a CUDA GPU; on a CPU use fp32 or bf16")
        return Device(provenance.CPU)
    name, major = gpus[index]["name"], gpus[index]["major"]
    if precision in ("bf16", "tf32") and major < 8:
        raise BenchError(f"--precision {precision}: {name} has no {precision}; use fp32 or fp16")
    return Device(provenance.slug(name), name, index, gpus[index].get("uuid", ""))


def _cuda_devices() -> list[dict[str, Any]]:
    """Name, compute capability and UUID of every GPU that torch can use."""
    code = (
        "import json, torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
        "all = [torch.cuda.get_device_properties(i) for i in range(n)]; "
        "print(json.dumps([{'name': p.name, 'major': p.major, 'uuid': str(p.uuid)} for p in all]))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(f"torch cannot be asked for GPUs: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"torch cannot be asked for GPUs: {error}") from error
