"""Device, precision and settings of torch on a GPU, one place for whatever measures or trains."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from bench.spec import Precision


def accelerator(precision: Precision, on_gpu: bool) -> Accelerator:
    """A new one, with a loss scale of its own; TF32 is `set_up`'s."""
    made = Accelerator(mixed_precision=precision if precision in ("bf16", "fp16") else "no", cpu=not on_gpu)
    if (made.device.type == "cuda") != on_gpu:  # figures of one device under the name of another
        raise RuntimeError(f"accelerate chose {made.device} where {'cuda' if on_gpu else 'cpu'} was asked for")
    return made


def set_up(precision: Precision, cudnn_benchmark: bool = False) -> None:
    """TF32 as the precision says, cuDNN's choice of algorithms as asked, and no attention of cuDNN's; without a GPU
    nothing.

    In half precision newer torch prefers that one, and it takes no bias that is trained: methods that train one would
    run on another kernel than those that do not, and the difference would count as theirs.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.enable_cudnn_sdp(False)
