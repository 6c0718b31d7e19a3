"""The trained part of a model on disk, beside its record: what training changed, as safetensors.

With it goes what the model said to a fixed input: a method's code may change after it was trained, and other code takes
the same weights without a word.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bench.errors import BenchError
from bench.files import replacing
from methods.model import MultiTaskModel

GRID = 4  # places to a side at which answers are kept
TOLERANCE = 0.005  # of a task's largest answer: processors differ by less


def save_trained(model: MultiTaskModel, path: Path, size: tuple[int, int]) -> str:
    """Write it atomically and return the file's SHA-256; `size`: (height, width) of the images it was trained on.

    Raises BenchError where that cannot be done.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.trained_state().items()}
    answers = _answers(model, size)
    known = all(math.isfinite(value) for values in answers.values() for value in values)
    about = {"size": size, "answers": answers} if known else {}
    try:
        with replacing(path, alone=True) as temporary:
            save_file(tensors, temporary, {"bench": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise BenchError(f"cannot write {path}: {error}; --no-keep-weights does without") from error
    return digest(path)


def load_trained(model: MultiTaskModel, path: Path, sha256: str) -> None:
    """Put it into the same model, built anew. Raises BenchError for another file, another model, or one that answers
    differently than the trained one did."""
    if not path.is_file() or not sha256:
        raise BenchError(
            f"no trained weights {path.name} beside the record: it was written before they were kept, or with "
            "--no-keep-weights; `bench run ... --fresh` trains the cell again"
        )
    if digest(path) != sha256:
        raise BenchError(f"{path} is not the file that its record names (SHA-256 differs); train the cell again")
    try:
        model.load_trained_state(load_file(path))
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("bench", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise BenchError(f"cannot load {path}: {error}") from error
    if about:  # in files from before there are none
        _compare(about["answers"], _answers(model, about["size"]), path)


def _compare(before: dict[str, list[float]], now: dict[str, list[float]], path: Path) -> None:
    worst = {}
    for task, values in before.items():
        then, found = torch.tensor(values), torch.tensor(now[task])
        worst[task] = ((then - found).abs().max() / then.abs().max().clamp_min(1e-12)).item()
    bad = {task: value for task, value in worst.items() if not value <= TOLERANCE}
    if bad:
        told = ", ".join(f"{task} by {value:.1%}" for task, value in bad.items())
        raise BenchError(
            f"the model answers otherwise than when it was trained ({told}): its code, or a library, has changed since "
            f"{path.name} was written; go back to the commit that the record names, or train the cell again"
        )


@torch.inference_mode()
def _answers(model: MultiTaskModel, size: tuple[int, int]) -> dict[str, list[float]]:
    """Task -> mean logits by place of a fixed image of noise, in single precision on the CPU, where the model is left:
    a GPU's TF32 and the autocast that is wrapped around a model's own `forward` would not be repeated."""
    was_training = model.training
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    outputs = type(model).forward(model.cpu().eval(), image)
    model.train(was_training)
    return {task: F.adaptive_avg_pool2d(out.float(), GRID).flatten().tolist() for task, out in outputs.items()}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
