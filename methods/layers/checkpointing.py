"""Activation checkpointing for any method: less memory for a second forward, the same figures.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. What is recomputed in backward are units: the two
sub-layers of a transformer block where a method uses the backbone's verbs, and every module that is an element of an
nn.ModuleList or nn.ModuleDict of the model (a method's blocks and stages, the decoder's necks and heads).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from methods.backbones.base import TransformerBackbone

CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def checkpoint_activations(model: nn.Module) -> None:
    """From now on the model keeps the inputs of its units alone and recomputes the rest in backward."""
    inside = [False]  # a unit within a unit is part of it

    def recomputed(module: nn.Module, forward: Callable) -> Callable:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if inside[0] or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            again = _Again(module, _get_current_function_mode_stack())
            return checkpoint(
                once,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,  # `again` does: `checkpoint` would ask a GPU for it once a tensor of `args`
                context_fn=lambda: (nullcontext(), again),
                **kwargs,
            )

        def once(*args: Any, **kwargs: Any) -> Any:
            inside[0] = True
            try:
                return forward(*args, **kwargs)
            finally:
                inside[0] = False

        return run

    for module in model.modules():
        if isinstance(module, TransformerBackbone):
            module.attention = recomputed(module, module.attention)
            module.feed_forward = recomputed(module, module.feed_forward)
    for unit in dict.fromkeys(_units(model)):
        unit.forward = recomputed(unit, unit.forward)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        # By exact type: timm derives networks with a forward of their own from these containers.
        element = type(module) in CONTAINERS and type(child) not in CONTAINERS
        if element and not any(isinstance(part, TransformerBackbone) for part in child.modules()):
            yield child
        else:
            yield from _units(child)


class _Again:
    """For a recomputation, which may come several times: torch's function modes and random numbers are those of the
    forward, and a batch norm must not update its running statistics once more."""

    def __init__(self, module: nn.Module, modes: list[TorchFunctionMode]) -> None:
        self.module, self.modes = module, modes
        self.gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        self.random = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in self.gpus]

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        self.before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        self.stack = ExitStack()
        self.stack.enter_context(torch.random.fork_rng(self.gpus))
        on_cpu, on_gpus = self.random
        torch.set_rng_state(on_cpu)
        for gpu, state in zip(self.gpus, on_gpus, strict=True):
            torch.cuda.set_rng_state(state, gpu)
        for mode in self.modes:
            self.stack.enter_context(mode)

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        for norm, momentum, batches in self.before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)
