"""`bench predict`: what a trained cell says of images, as pictures and as arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor

from bench.data import decode, transforms
from bench.data.card import Card
from bench.data.preview import HEADER, MARGIN, draw, palette, save
from bench.errors import BenchError
from bench.files import write_atomically
from bench.verbs.trained import Trained
from methods.model import upsample_logits

CLASSES, PROBABILITY = "uint8 class number (classes.json)", "float32 probability"
ARRAYS = {  # task -> of each pixel
    "semseg": CLASSES,
    "human_parts": CLASSES,
    "saliency": PROBABILITY,
    "edge": PROBABILITY,
    "depth": "float32 metres",
    "normals": "float32 unit vector in the camera frame (x right, y down)",
}


@torch.inference_mode()
def predict(trained: Trained, image: np.ndarray, device: torch.device) -> dict[str, np.ndarray]:
    """image uint8 (H, W, 3) of any size -> an array (H, W), of normals (H, W, 3), a task; what it holds: ARRAYS.

    The network sees the image squashed to the size that it was trained at, as evaluation does it.
    """
    squashed = network_input(image, trained.record.spec.image_size)
    logits = trained.model(squashed[None].to(device))
    return {task: to_array(task, upsample_logits(out, image.shape[:2])[0].cpu()) for task, out in logits.items()}


def network_input(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """uint8 (H, W, 3) -> float (3, *size) in [0, 1]."""
    return transforms.resize(transforms.unpack(transforms.pack({"image": image})), size)["image"]


def to_array(task: str, logits: Tensor) -> np.ndarray:
    """logits (n, H, W) -> what they mean."""
    if task in ("semseg", "human_parts"):
        return logits.argmax(0).to(torch.uint8).numpy()
    if task in ("saliency", "edge"):
        return logits[0].sigmoid().numpy()
    if task == "depth":
        return logits[0].numpy()
    return F.normalize(logits, dim=0).permute(1, 2, 0).numpy()


def picture(task: str, array: np.ndarray, card: Card, near_far: tuple[float, float] | None = None) -> np.ndarray:
    """An array of `predict` in colours, uint8 (H, W, 3); `near_far` as in `draw`."""
    if task == "depth":
        array = array.clip(1e-3)  # at or below zero would count as unlabelled
    return draw(task, array.transpose(2, 0, 1) if task == "normals" else array, card, near_far)


def strip(image: np.ndarray, pictures: dict[str, np.ndarray]) -> Image.Image:
    """The image and its predictions side by side, named."""
    columns = {"image": image, **pictures}
    height, width = image.shape[:2]
    out = Image.new("RGB", (len(columns) * (width + MARGIN), HEADER + height), (40, 40, 40))
    pen = ImageDraw.Draw(out)
    for column, (name, drawn) in enumerate(columns.items()):
        left = column * (width + MARGIN)
        pen.text((left + 2, 2), name, fill=(255, 255, 255))
        out.paste(Image.fromarray(drawn), (left, HEADER))
    return out


def run(trained: Trained, images: Sequence[Path], out: Path, device: torch.device, console: Console) -> None:
    """Write `NAME.npz`, `NAME_TASK.png` and `NAME.png`, all side by side, for every image; and classes.json, what the
    class numbers stand for and their colours.

    Raises BenchError for a file that is no image, before anything is written.
    """
    if out.exists() and not out.is_dir():
        raise BenchError(f"--out {out} is a file; name a folder")
    if len(set(images)) < len(images):
        raise BenchError(f"{next(path for path in images if images.count(path) > 1)} is named twice")
    written: dict[str, Path] = {}  # what will be, by which image; some file systems take a.PNG for a.png
    for path in images:
        if path.is_dir():
            raise BenchError(f"{path} is a folder; name image files, e.g. {path}/*.jpg")
        decode.read_image(path, upright=True)
        tails = (".npz", ".png", *(f"_{task}.png" for task in trained.record.spec.tasks))
        for target in (out.resolve() / f"{path.stem}{tail}" for tail in tails):
            other = written.setdefault(str(target).casefold(), path)
            if other != path:
                raise BenchError(
                    f"{other} and {path} would both write {target.name}: run them apart, with their own --out"
                )
    for path in images:
        if str(path.resolve()).casefold() in written:
            raise BenchError(f"--out {out}: {path} itself would be overwritten; name another folder")
    trained.model.to(device)
    for path in images:
        image = decode.read_image(path, upright=True).copy()
        arrays = predict(trained, image, device)
        pictures = {task: picture(task, array, trained.card) for task, array in arrays.items()}
        for task, drawn in pictures.items():
            save(Image.fromarray(drawn), out / f"{path.stem}_{task}.png")
        save(strip(image, pictures), out / f"{path.stem}.png")
        np.savez_compressed(out / f"{path.stem}.npz", **arrays)
        console.print(f"{path}: {', '.join(arrays)} -> {out / path.stem}.png", soft_wrap=True)
    classes = {
        task: [
            {"number": number, "name": name, "colour": "#" + bytes(colour).hex()}
            for number, (name, colour) in enumerate(zip(names, palette(trained.card, task).tolist(), strict=True))
        ]
        for task in trained.record.spec.tasks
        if (names := trained.card.tasks[task].classes)
    }
    if classes:
        write_atomically(out / "classes.json", json.dumps(classes, indent=1, ensure_ascii=False) + "\n")
    arrays_hold = ", ".join(f"{task} {ARRAYS[task]}" for task in trained.record.spec.tasks)
    console.print(f"Arrays, of every pixel of the image: {arrays_hold}.", style="dim", highlight=False)
