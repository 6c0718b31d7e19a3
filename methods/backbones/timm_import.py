"""The one place where timm is imported: torchvision, which it imports, may need help first."""

from __future__ import annotations

import methods.backbones.torchvision_import  # noqa: F401  isort: skip

import timm
import timm.data
import timm.layers
import timm.models

__all__ = ["timm"]
