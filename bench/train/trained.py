"""The trained part of a model on disk, beside its record: what training changed, as safetensors."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bench.errors import BenchError
from methods.model import MultiTaskModel


def save_trained(model: MultiTaskModel, path: Path) -> str:
    """Write it atomically and return the file's SHA-256. Raises BenchError where that cannot be done."""
    temporary = path.with_suffix(".partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.trained_state().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise BenchError(f"cannot write {path}: {error}; --no-keep-weights does without") from error
    return digest(path)


def load_trained(model: MultiTaskModel, path: Path, sha256: str) -> None:
    """Put it into the same model, built anew. Raises BenchError for another file or another model."""
    if not path.is_file() or not sha256:
        raise BenchError(
            f"no trained weights {path.name} beside the record: it was written before they were kept, or with "
            "--no-keep-weights; `bench run ... --fresh` trains the cell again"
        )
    if digest(path) != sha256:
        raise BenchError(f"{path} is not the file that its record names (SHA-256 differs); train the cell again")
    try:
        model.load_trained_state(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise BenchError(f"cannot load {path}: {error}") from error


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
