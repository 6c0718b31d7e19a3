"""Settings of torch on a GPU, one place for whatever measures or trains; without one they do nothing."""

from __future__ import annotations

import torch

from bench.spec import Precision


def set_up(precision: Precision, cudnn_benchmark: bool = False) -> None:
    """TF32 as the precision says, cuDNN's choice of algorithms as asked, and no attention of cuDNN's.

    In half precision newer torch prefers that one, and it takes no bias that is trained: methods that train one would
    run on another kernel than those that do not, and the difference would count as theirs.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.enable_cudnn_sdp(False)
