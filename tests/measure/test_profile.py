"""Efficiency figures on a CPU: how many steps, which of them count, and what they are run on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from bench.measure import cuda, profile, provenance
from bench.recipe import Measure
from bench.tasks import TASKS
from bench.train.losses import LOSSES

CPU = torch.device("cpu")
CHANNELS = {name: task.channels or 5 for name, task in TASKS.items()}


class Recorder:
    """Stands in for a Trainer: notes the steps; step s takes s + 1 seconds of `clock`."""

    accelerator = SimpleNamespace(device=CPU, scaler=None)
    clock = 0.0

    def __init__(self):
        self.steps = []

    def step(self, batch, step):
        self.steps.append(step)
        self.clock += step + 1


@pytest.mark.parametrize("warmup, steps", [(0, 1), (1, 5), (3, 2)])
def test_every_step_after_the_warm_up_is_a_sample(warmup, steps):
    trainer, reports = Recorder(), []
    batch = {"image": torch.zeros(7, 3, 4, 4)}
    memory, timing = profile.measure(
        trainer, batch, Measure(warmup=warmup, steps=steps), lambda *report: reports.append(report)
    )
    assert trainer.steps == list(range(warmup + steps))
    assert len(timing.samples) == steps
    assert (timing.warmup, timing.batch_size, timing.device, memory.device) == (warmup, 7, "cpu", "cpu")
    assert reports == [(done, warmup + steps) for done in range(1, warmup + steps + 1)]


def test_the_gpu_is_looked_at_after_a_last_step_was_queued_and_before_it_is_waited_for(monkeypatch):
    trainer, order = Recorder(), []
    clock = replace(profile.CPU_CLOCK, device="cuda", wait=lambda: order.append("wait"))
    monkeypatch.setattr(profile, "CPU_CLOCK", clock)
    batch = {"image": torch.zeros(1, 3, 4, 4)}
    look = lambda: order.append(len(trainer.steps))  # noqa: E731
    _, timing = profile.measure(trainer, batch, Measure(warmup=1, steps=2), lambda *report: None, look)
    assert order == ["wait", 4, "wait"] and len(timing.samples) == 2


@pytest.mark.parametrize(("left", "host_bound"), [(0.2, True), (0.3, False)])
def test_who_waits_is_told_by_what_is_queued_after_the_last_step(monkeypatch, left, host_bound):
    """Steps of 2, 3, 4, 5 and 6 seconds and then the queue: a twentieth of the median is 0.2."""
    trainer = Recorder()

    def wait():
        trainer.clock += left - 1e-9

    monkeypatch.setattr(profile.time, "perf_counter", lambda: trainer.clock)
    monkeypatch.setattr(profile, "CPU_CLOCK", replace(profile.CPU_CLOCK, device="cuda", wait=wait))
    batch = {"image": torch.zeros(1, 3, 4, 4)}
    _, timing = profile.measure(trainer, batch, Measure(warmup=1, steps=5), lambda *report: None)
    assert timing.queued == pytest.approx(left) and timing.host_bound == host_bound
    trainer.accelerator = SimpleNamespace(device=CPU, scaler=object())
    _, timing = profile.measure(trainer, batch, Measure(warmup=1, steps=5), lambda *report: None)
    assert timing.queued is None and not timing.host_bound


def test_on_a_cpu_nobody_waits():
    _, timing = profile.measure(Recorder(), {"image": torch.zeros(1, 3, 4, 4)}, Measure(), lambda *report: None)
    assert timing.queued is None and not timing.host_bound


@pytest.mark.parametrize("warmup, expected", [(0, [1, 2, 3]), (1, [2, 3, 4]), (2, [3, 4, 5])])
def test_the_first_steps_are_in_no_sample(monkeypatch, warmup, expected):
    trainer = Recorder()
    monkeypatch.setattr(profile.time, "perf_counter", lambda: trainer.clock)
    batch = {"image": torch.zeros(1, 3, 4, 4)}
    _, timing = profile.measure(trainer, batch, Measure(warmup=warmup, steps=3), lambda *report: None)
    assert timing.samples == expected


def test_a_cpu_has_no_allocator_figures():
    memory, _ = profile.measure(Recorder(), {"image": torch.zeros(1, 3, 4, 4)}, Measure(), lambda *report: None)
    assert memory.peak_allocated is memory.peak_reserved is memory.weights_allocated is None


@pytest.mark.parametrize("platform, unit", [("freebsd14", 1024), ("darwin", 1)])
def test_the_resident_peak_is_in_bytes_whatever_the_system_counts_in(monkeypatch, platform, unit):
    monkeypatch.setattr(profile.sys, "platform", platform)
    monkeypatch.setattr(profile.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3_000_000))
    assert profile.resident_peak() == 3_000_000 * unit


def test_the_resident_peak_is_the_processes_own():
    """It knows of memory given back, and nothing of what the process that started this one holds."""
    held = b"1" * 2**30
    code = """
from bench.measure.profile import resident_peak
before = resident_peak()
block = b"1" * (300 * 2**20)
del block
print(before, resident_peak())
"""
    root = Path(profile.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before + 250 * 2**20 < after < before + 350 * 2**20
    assert after < len(held)


def test_a_synthetic_batch_has_every_tasks_shape_and_encoding():
    batch = profile.synthetic_batch(CHANNELS, (24, 32), 3, CPU)
    assert set(batch) == {"image", *TASKS}
    assert batch["image"].shape == batch["normals"].shape == (3, 3, 24, 32)
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    for task in ("semseg", "human_parts"):
        assert batch[task].dtype == torch.int64 and set(batch[task].unique().tolist()) == set(range(5))
    for task in ("saliency", "edge"):
        assert set(batch[task].unique().tolist()) == {0, 1}
    assert 0.1 < batch["depth"].min() and batch["depth"].max() < 100
    torch.testing.assert_close(batch["normals"].norm(dim=1), torch.ones(3, 24, 32))


@pytest.mark.parametrize("task", TASKS)
def test_a_synthetic_labels_loss_is_finite_and_above_zero(task):
    batch = profile.synthetic_batch(CHANNELS, (16, 16), 2, CPU)
    logits = torch.randn(2, CHANNELS[task], 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = LOSSES[task](logits, batch[task])
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert logits.grad.isfinite().all() and logits.grad.any()


def test_synthetic_batches_are_the_same_every_time():
    one, other = (profile.synthetic_batch(CHANNELS, (16, 16), 2, CPU) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_rate_of_a_matrix_product_is_operations_over_the_fastest_repeat(monkeypatch):
    """Repeats of 4, 2 and 8 seconds after a first one that does not count: 2 n^3 operations in 2 seconds."""
    moments = iter([0, 1, 10, 14, 20, 22, 30, 38])
    monkeypatch.setattr(profile, "CPU_CLOCK", replace(profile.CPU_CLOCK, now=lambda: next(moments)))
    assert profile.matmul_rate(Accelerator(cpu=True), repeats=3) == 2 * 1024**3 / 2


def test_predictions_leave_the_model_training_and_keep_no_graph(build):
    model = build("decoder_only")
    seen = []
    model.register_forward_hook(lambda m, inputs, out: seen.append((m.training, out["semseg"].requires_grad)))
    profile.predict(SimpleNamespace(model=model.train()), {"image": torch.rand(1, 3, 64, 64)})
    assert seen == [(False, False)] and model.training


def test_torch_on_a_gpu_is_set_up_alike_for_all():
    flags = lambda: (  # noqa: E731
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    before = flags()
    try:
        cuda.set_up("tf32", cudnn_benchmark=True)
        assert flags() == (True, True, True, False)
        cuda.set_up("bf16")
        assert flags() == (False, False, False, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[
            :3
        ]
        torch.backends.cuda.enable_cudnn_sdp(before[3])


def test_without_its_repository_the_commit_is_what_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert provenance.git_state() == (None, None)
    monkeypatch.setenv("BENCH_COMMIT", "abc123")
    assert provenance.git_state() == ("abc123", None)
