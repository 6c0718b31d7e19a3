"""Tiny models that the tests of the methods and of the training loop share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors more threads cost more than they save

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Nothing is left in the user's own cache."""
    os.environ["BENCH_CACHE"] = str(tmp_path_factory.mktemp("bench-cache"))


@pytest.fixture(scope="session", autouse=True)
def evaluation_is_imported_once():
    """Most cells of the tests evaluate, and torchmetrics takes longer to import than such a cell to run."""
    from bench import processes

    processes.PRELOADED.append("bench.train.evaluation")


@pytest.fixture(scope="session")
def tasks():
    return {"semseg": 21, "human_parts": 7, "saliency": 1, "normals": 3}


@pytest.fixture(scope="session")
def tiny_swin():
    """(size) -> a Swin of width 24 with random weights, as the harness wraps one."""

    def make(size=(64, 64), depths=(2, 2, 2, 2)):
        from methods.backbones.swin import SwinBackbone
        from methods.backbones.timm_import import timm

        model = timm.create_model(
            "swin_tiny_patch4_window7_224", embed_dim=24, depths=depths, num_heads=(1, 2, 3, 6), num_classes=0,
            img_size=size, always_partition=True, drop_path_rate=0.0,
        )  # fmt: skip
        return SwinBackbone("tiny_swin", model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    return make


@pytest.fixture(scope="session")
def build(tiny_swin, tasks):
    """(expression) -> that method's model on the tiny Swin; seeded before the backbone is made, as a run does it."""

    def make(expression, tasks=tasks, protocol="published", decoder=None, seed=0, size=(64, 64), backbone=None):
        import torch

        from methods.model import Setting
        from methods.registry import parse

        torch.manual_seed(seed)
        (configured,) = parse(expression)
        return configured.build((backbone or tiny_swin)(size), tasks, Setting(protocol, decoder))

    return make
