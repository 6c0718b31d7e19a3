"""Which methods which backbones can serve: tried on the meta device, which has shapes and no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from bench.errors import BenchError
from methods.backbones.base import Backbone
from methods.backbones.load import WeightSource, load_backbone
from methods.model import Setting
from methods.registry import Configured, MethodError, asks_for_all, parse

T = TypeVar("T")


def fitting(
    methods: str,
    backbones: Sequence[str],
    size: tuple[int, int],
    channels: Mapping[str, int],
    setting: Setting,
    tell: Callable[[str], None],
) -> dict[str, list[Configured]]:
    """Each backbone that can serve some of the methods, and which; else as `on_each`."""

    def build(backbone: str, frame: Backbone, method: Configured) -> Configured:
        method.try_build(frame, channels, setting)
        return method

    return on_each(methods, backbones, size, build, tell)


def on_each(
    methods: str,
    backbones: Sequence[str],
    size: tuple[int, int],
    attempt: Callable[[str, Backbone, Configured], T],
    tell: Callable[[str], None],
) -> dict[str, list[T]]:
    """Full name of a backbone -> what the attempt with each of the methods came to. It gets a backbone of its own, on
    the meta device, and raises MethodError for a method that the backbone cannot serve.

    `tell` hears what is left out: of `all` methods, those; of named ones, those that another of the backbones serves.
    Raises BenchError or MethodError in one line where that leaves nothing, or a named method with no backbone.
    """
    found: dict[str, list[T]] = {}
    refused: list[tuple[str | None, MethodError]] = []
    served: set[str | None] = set()
    for backbone in dict.fromkeys(backbones):
        with torch.device("meta"):
            try:
                frame = load_backbone(backbone, size, WeightSource("random"))
            except MethodError as error:  # at this size, say: whatever the method
                refused.append((None, error))
                continue
            for method in parse(methods):
                try:
                    # A copy: made anew, the backbone would take longer than the method.
                    result = attempt(backbone, copy.deepcopy(frame), method)
                except MethodError as error:
                    refused.append((method.expression, error))
                    continue
                found.setdefault(backbone, []).append(result)
                served.add(method.expression)
    sizes = [error for expression, error in refused if expression is None]
    if sizes and not found:
        raise sizes[0]
    for expression, error in refused:
        if expression not in served and not asks_for_all(methods):
            raise error
        tell(f"left out: {error}")
    if not found:
        raise BenchError(f"none of the methods can run on {', '.join(dict.fromkeys(backbones))}")
    return found
