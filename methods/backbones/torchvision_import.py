"""Lets torchvision be imported where its C++ operators cannot load. Import this before anything that imports it.

torchvision's Python part registers meta kernels for its C++ operators at import time. Where torch and torchvision
come from different builds (a CPU-only torch beside PyPI's CUDA torchvision), that C++ library cannot load and the
import dies with "operator torchvision::nms does not exist"; timm and torchmetrics import torchvision. Nothing here
calls those operators, so declaring their schemas is enough. With a matching pair this does nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_LIBRARY: torch.library.Library | None = None  # a Library's definitions live as long as the object


def _declare_missing_operators() -> None:
    global _LIBRARY
    found = importlib.util.find_spec("torchvision")
    if _LIBRARY is not None or found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for extension in Path(found.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(extension)
            return
        except OSError:
            continue
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_missing_operators()
