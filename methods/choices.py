"""What a model can be built under, by name. Free of torch, so that a command line can say what it takes at once."""

from __future__ import annotations

from typing import Literal

Protocol = Literal["published", "equal"]
DecoderName = Literal["segformer", "hrnet", "highres"]
MemoryUse = Literal["default", "low"]  # low: activation checkpointing, the same figures for more time
