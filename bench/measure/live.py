"""Bytes of live tensors while something runs, by phase and by module; on real tensors or on fake ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

OUTSIDE = ""  # the owner of what is made while no module runs: losses, gradients, optimizer


def conv_backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    """The gradient of the input and that of the weight take as many operations as the forward each.

    torch's own formula takes every convolution for one without groups where it comes to the weight's gradient: of a
    depthwise one over C channels it counts C times as many operations as there are.
    """
    _, _, _, _, transposed, _, _, wanted = args  # of input, weight and bias: which gradients
    places = (x if transposed else grad).shape[2:]
    once = 2 * x.shape[0] * prod(places) * weight.numel()
    return once * sum(wanted[:2])


FORMULAS = flop_registry | {torch.ops.aten.convolution_backward: conv_backward_flops}


class LiveBytes(TorchDispatchMode):
    """Counts every storage from the operator that makes it until it is freed, rounded up to `granule` bytes.

    Temporaries inside one operator (a kernel's workspace) are not seen. `peaks` holds the largest sum by phase;
    `holders` who owned the bytes when the largest of all was reached: the innermost module running when a storage was
    made, by its path in `model`. `flops` by phase are those of matrix products, convolutions and attention, a
    multiplication and an addition each, by torch's own formulas but for one (see `conv_backward_flops`).
    """

    def __init__(self, granule: int = 1) -> None:
        super().__init__()
        self.granule = granule
        self.live = self.peak = 0
        self.peaks: dict[str, int] = {}
        self.flops: Counter[str] = Counter()
        self.holders: Counter[str] = Counter()
        self._owned: Counter[str] = Counter()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._phase = ""
        self._path = [OUTSIDE]

    def phase(self, name: str) -> None:
        """From now on, peaks count for this phase."""
        self._phase = name
        self.peaks[name] = max(self.peaks.get(name, 0), self.live)

    def restart(self) -> None:
        """Forget peaks and operations; what is live stays counted."""
        self.peak, self.peaks, self.flops = 0, {}, Counter()

    def hold(self, tensors: Iterable[Tensor], owner: str = "weights") -> None:
        """Count what was made before."""
        for tensor in tensors:
            self._add(tensor, owner)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Attribute what is made inside the model's modules to them."""
        hooks = []
        for path, module in model.named_modules():
            if path:
                hooks.append(module.register_forward_pre_hook(lambda *_, path=path: self._path.append(path)))
                hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(self) -> None:
        self._path.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops[self._phase] += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, self._path[-1])
        return out

    def _add(self, tensor: Tensor, owner: str) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = -(-storage.nbytes() // self.granule) * self.granule
        self.live += size
        self._owned[owner] += size
        weakref.finalize(storage, self._free, size, owner)
        if self.live > self.peak:
            self.peak = self.live
            self.holders = self._owned.copy()
        if self.live > self.peaks.get(self._phase, 0):
            self.peaks[self._phase] = self.live

    def _free(self, size: int, owner: str) -> None:
        self.live -= size
        self._owned[owner] -= size
