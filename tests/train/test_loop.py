"""The training loop: schedules, one step against a joint backward, resuming, and evaluation."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from bench.data import card as cards
from bench.data.loader import DenseDataset, validation_batches
from bench.errors import BenchError
from bench.measure.profile import synthetic_batch
from bench.recipe import Augment, Optimizer, Recipe, Schedule
from bench.train import metrics
from bench.train.evaluation import evaluate
from bench.train.floor import score_floors
from bench.train.loop import (
    DivergedError,
    Progress,
    Trainer,
    learning_rate,
    load_checkpoint,
    losses_by_batch,
    make_optimizer,
    save_checkpoint,
    train,
)
from bench.train.losses import LOSSES

SIZE = (32, 32)
WEIGHTS = {"semseg": 1.0, "human_parts": 2.0, "saliency": 5.0, "normals": 10.0, "depth": 1.0, "edge": 50.0}
SIX = {"semseg": 21, "human_parts": 7, "saliency": 1, "normals": 3, "depth": 1, "edge": 1}


def recipe(**changes):
    settings = {
        "title": "Test",
        "optimizer": Optimizer(name="adamw", lr=1e-3, weight_decay=1e-2),
        "schedule": Schedule(name="cosine", warmup=0.2),
        "batch_size": 2,
        "steps": 6,
        "loss_weights": WEIGHTS,
    }
    return Recipe(**(settings | changes))


@pytest.fixture
def trainer(build):
    """(expression) -> a trainer of that method on the CPU."""

    def make(expression="decoder_only", tasks=None, total=6, seed=0, protocol="published", **changes):
        kept = {"tasks": tasks} if tasks else {}
        model = build(expression, seed=seed, size=SIZE, protocol=protocol, **kept)
        torch.manual_seed(seed)
        return Trainer(model, recipe(**changes), 2, total, Accelerator(cpu=True))

    return make


@pytest.fixture(scope="module")
def card():
    return cards.load("scenes")


@pytest.fixture(scope="module")
def dataset(card, tasks):
    return DenseDataset(card, "train", tuple(tasks), SIZE, limit=4, augment=Augment(hflip=0.5), seed=3)


def run(trainer, dataset, checkpoint, report=lambda *args: None, **more):
    return train(trainer, dataset, 2, 0, checkpoint, 1e9, report, **more)


def values(trainer):
    return {name: tensor.clone() for name, tensor in trainer.plain_model.trained_state().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


# Learning rate


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "constant"}, [1, 1, 1, 1]),
        ({"name": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"name": "linear", "final": 0.2}, [1, 0.8, 0.6, 0.4]),
        ({"name": "cosine"}, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ({"name": "cosine", "final": 0.5}, [1, (3 + math.sqrt(0.5)) / 4, 0.75, (3 - math.sqrt(0.5)) / 4]),
        ({"name": "poly", "power": 2.0}, [1, 9 / 16, 1 / 4, 1 / 16]),
        ({"name": "poly"}, [1, 0.75**0.9, 0.5**0.9, 0.25**0.9]),
        ({"name": "constant", "warmup": 0.5}, [0, 0.5, 1, 1]),
        ({"name": "linear", "warmup": 0.5}, [0, 0.5, 1, 0.5]),
        ({"name": "linear", "warmup": 0.5, "warmup_start": 0.2, "final": 0.4}, [0.2, 0.6, 1, 0.7]),
        ({"name": "cosine", "warmup": 1.0, "warmup_start": 0.1}, [0.1, 0.325, 0.55, 0.775]),
    ],
)
def test_schedules(settings, expected):
    assert [learning_rate(Schedule(**settings), step, 4) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["linear", "cosine", "poly"])
def test_beyond_its_end_a_schedule_stays_where_it_ended(name):
    """fp16's loss scale may need more steps to settle than a measurement has."""
    schedule = Schedule(name=name, final=0.25)
    assert [learning_rate(schedule, step, 2) for step in (2, 3, 30)] == pytest.approx([0.25] * 3)


def test_a_run_of_one_step_has_a_rate():
    for name in ("constant", "linear", "cosine", "poly"):
        assert learning_rate(Schedule(name=name), 0, 1) == 1


def test_the_schedule_reaches_the_optimizer(trainer, dataset, tmp_path):
    settings = Optimizer(name="adamw", lr=0.01, base_batch_size=8)  # 0.0025 at a batch of 2
    runner = trainer(optimizer=settings, schedule=Schedule(name="linear", warmup=0.5))
    history = run(runner, dataset, tmp_path / "c").history
    expected = [0.0025 * factor for factor in (0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)]
    assert [entry["lr"] for entry in history] == pytest.approx(expected)
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]


# Optimizer


@pytest.mark.parametrize("expression", ["mtlora", "ours", "single_task_full"])
def test_the_optimizer_holds_the_trainable_parameters_alone(build, expression):
    model = build(expression, size=SIZE)
    held = [p for group in make_optimizer(model, recipe(), 2).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})


def test_decay_may_leave_out_one_dimensional_parameters(build):
    model = build("mtlora", size=SIZE)
    for everything in (True, False):
        settings = Optimizer(name="adamw", lr=1.0, weight_decay=0.1, decay_one_dimensional=everything)
        decay = {
            id(p): group["weight_decay"]
            for group in make_optimizer(model, recipe(optimizer=settings), 2).param_groups
            for p in group["params"]
        }
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert decay[id(p)] == (0.1 if everything or p.dim() > 1 else 0.0), name


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("expression", ["multi_task_full", "single_task_full", "bitfit", "ours", "mtlora"])
def test_a_backbone_that_is_trained_whole_learns_at_its_share_of_the_rate(build, expression, everything):
    model = build(expression, size=SIZE)
    settings = Optimizer(name="adamw", lr=0.3, backbone_factor=0.1, weight_decay=0.1, decay_one_dimensional=everything)
    groups = make_optimizer(model, recipe(optimizer=settings), 2).param_groups
    slow = sum(p.numel() for group in groups if group["lr"] == pytest.approx(0.03) for p in group["params"])
    fast = sum(p.numel() for group in groups if group["lr"] == pytest.approx(0.3) for p in group["params"])
    ledger = model.ledger()
    assert ledger.backbone > 0 or expression == "ours"  # bitfit and mtlora train a part of it
    assert slow == (ledger.backbone if expression.endswith("_full") else 0)
    assert slow + fast == ledger.trainable
    assert groups[0]["lr"] == pytest.approx(0.3)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters() if p.requires_grad})


@pytest.mark.parametrize("name", ["multi_task_full", "single_task_full"])
@pytest.mark.parametrize(
    ("own", "of_recipe", "expected"), [(None, 0.1, 0.1), (0.5, 0.1, 0.5), (1, 0.1, 1), (0.5, 1, 0.5)]
)
def test_a_methods_own_share_of_the_rate_goes_before_the_recipes(build, name, own, of_recipe, expected):
    model = build(name if own is None else f"{name}[backbone_factor={own}]", size=SIZE)
    settings = Optimizer(name="sgd", lr=0.3, backbone_factor=of_recipe)
    groups = make_optimizer(model, recipe(optimizer=settings), 2).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    pretrained = model.pretrained()
    for parameter, p in model.named_parameters():
        assert rates[id(p)] == pytest.approx(0.3 * (expected if parameter in pretrained else 1)), parameter


@pytest.mark.parametrize("expression", ["ours", "mtlora", "bitfit", "decoder_only", "multi_task_full"])
@pytest.mark.parametrize("factor", [0.1, 1.0, 4.0])
def test_what_a_method_adds_learns_at_its_own_share_of_the_rate(build, expression, factor):
    model = build(expression, size=SIZE)
    settings = Optimizer(
        name="adamw",
        lr=0.3,
        backbone_factor=0.02,
        adaptation_factor=factor,
        weight_decay=0.1,
        decay_one_dimensional=False,
    )
    groups = make_optimizer(model, recipe(optimizer=settings), 2).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    apart = set()
    for name, p in model.named_parameters():
        if p.requires_grad:
            decodes = name.startswith("decoder.") and ".mixer." not in name
            share = 1 if decodes else 0.02 if expression == "multi_task_full" else factor
            assert rates.pop(id(p)) == pytest.approx(0.3 * share), name
            assert decay[id(p)] == (0.1 if p.dim() > 1 else 0), name
            apart |= set() if decodes else {name}
    assert not rates
    assert groups[0]["lr"] == pytest.approx(0.3)  # the history's
    assert bool(apart) == (expression != "decoder_only")
    assert any(name.startswith("decoder.mixer.") for name in apart) == (expression == "ours")


def test_one_rate_for_all_keeps_the_parameters_in_one_order(build):
    """A checkpoint's optimizer state goes by position."""
    model = build("mtlora", size=SIZE)
    (group,) = make_optimizer(model, recipe(optimizer=Optimizer(name="adamw", lr=0.3)), 2).param_groups
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in group["params"]] == expected


def test_the_rates_of_all_groups_follow_the_schedule(trainer):
    settings = Optimizer(name="sgd", lr=0.3, backbone_factor=0.1)
    trainer = trainer("multi_task_full", total=10, optimizer=settings)
    before = {name: p.detach().clone() for name, p in trainer.plain_model.named_parameters()}
    factor = learning_rate(trainer.recipe.schedule, 3, 10)
    trainer.step(synthetic_batch(trainer.plain_model.tasks, SIZE, 2, torch.device("cpu")), 3)
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    pretrained = trainer.plain_model.pretrained()
    for name, p in trainer.plain_model.named_parameters():
        assert rates[id(p)] == pytest.approx(factor * (0.03 if name in pretrained else 0.3)), name
    assert any(
        not torch.equal(before[name], p) for name, p in trainer.plain_model.named_parameters() if name in pretrained
    )


@pytest.mark.parametrize(("base", "batch", "expected"), [(None, 6, 0.3), (12, 6, 0.15), (2, 6, 0.9)])
def test_the_rate_scales_with_the_batch(build, base, batch, expected):
    settings = Optimizer(name="adam", lr=0.3, base_batch_size=base)
    optimizer = make_optimizer(build("decoder_only", size=SIZE), recipe(optimizer=settings), batch)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * len(optimizer.param_groups))


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_kinds_of_optimizer(build, name, kind):
    settings = Optimizer(name=name, lr=0.1, momentum=0.7, betas=(0.5, 0.6))
    optimizer = make_optimizer(build("decoder_only", size=SIZE), recipe(optimizer=settings), 2)
    assert type(optimizer).__name__ == kind
    assert optimizer.defaults["momentum"] == 0.7 if name == "sgd" else optimizer.defaults["betas"] == (0.5, 0.6)


# One step


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def joint(model, batch):
    """One backward of the weighted sum of the losses at full resolution."""
    torch.manual_seed(7)
    outputs = model.train()(batch["image"])
    losses = {task: LOSSES[task](out, batch[task]) for task, out in outputs.items()}
    sum(WEIGHTS[task] * loss for task, loss in losses.items()).backward()
    return losses


@pytest.mark.parametrize("expression", ["decoder_only", "multi_task_full", "single_task_full", "mtlora", "ours"])
def test_task_by_task_is_a_joint_backward(trainer, build, expression):
    runner, model = trainer(expression, tasks=SIX), build(expression, size=SIZE, tasks=SIX)
    batch = synthetic_batch(SIX, SIZE, 2, torch.device("cpu"))
    losses = joint(model, batch)
    torch.manual_seed(7)
    stepped = runner.step(batch, 0)
    assert stepped.keys() == losses.keys()
    for task in losses:
        torch.testing.assert_close(stepped[task], losses[task].detach())
        assert not stepped[task].requires_grad
    ours, theirs = gradients(runner.plain_model), gradients(model)
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * scale.item(), msg=name)
    expected = sum(WEIGHTS[task] * loss.item() for task, loss in losses.items())
    assert runner.total_loss(stepped) == pytest.approx(expected)


@pytest.mark.parametrize(("expression", "independent"), [("single_task_full", True), ("multi_task_full", False)])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_by_task_where_tasks_share_nothing(trainer, build, tasks, expression, independent, limit):
    runner, model = trainer(expression, clip_norm=limit), build(expression, size=SIZE)
    batch = synthetic_batch(tasks, SIZE, 2, torch.device("cpu"))
    joint(model, batch)
    runner.step(batch, 0)
    raw, clipped = gradients(model), gradients(runner.plain_model)
    groups = {}
    for name in raw:
        groups.setdefault(model.owners()[name] if independent else None, []).append(name)
    assert len(groups) == (4 if independent else 1)
    for names in groups.values():
        norm = math.sqrt(sum(raw[name].double().square().sum().item() for name in names))
        assert norm > 0.5
        factor = min(1.0, limit / norm)
        after = math.sqrt(sum(clipped[name].double().square().sum().item() for name in names))
        assert after == pytest.approx(factor * norm, rel=1e-4)
        for name in names:
            torch.testing.assert_close(clipped[name], factor * raw[name], rtol=1e-3, atol=1e-5 * factor * norm)


def test_a_step_of_sgd_by_hand(trainer, tasks):
    settings = Optimizer(name="sgd", lr=0.1, momentum=0.0)
    runner = trainer(optimizer=settings, schedule=Schedule(name="linear"), total=4)
    before = {name: p.detach().clone() for name, p in runner.plain_model.named_parameters()}
    runner.step(synthetic_batch(tasks, SIZE, 2, torch.device("cpu")), 3)
    gradient = gradients(runner.plain_model)
    for name, p in runner.plain_model.named_parameters():
        moved = 0.1 * 0.25 * gradient[name] if name in gradient else 0
        torch.testing.assert_close(p.detach(), before[name] - moved)


def test_steps_do_not_add_up_their_gradients(trainer, tasks):
    runner = trainer(optimizer=Optimizer(name="sgd", lr=1e-30, momentum=0.0), schedule=Schedule(name="constant"))
    batch = synthetic_batch(tasks, SIZE, 2, torch.device("cpu"))
    runner.step(batch, 0)
    first = {name: g.clone() for name, g in gradients(runner.plain_model).items()}
    runner.step(batch, 1)
    assert_same(first, gradients(runner.plain_model))


@pytest.fixture
def mixed_precision():
    AcceleratorState._reset_state()
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state()


def test_mixed_precision(build, tasks, mixed_precision):
    runner = Trainer(build("ours", size=SIZE), recipe(clip_norm=5.0), 2, 2, mixed_precision)
    batch, inside = synthetic_batch(tasks, SIZE, 2, torch.device("cpu")), []
    runner.plain_model.decoder.heads["semseg"].register_forward_hook(lambda *args: inside.append(args[2].dtype))
    losses = runner.step(batch, 0)
    assert inside == [torch.bfloat16]
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.dtype == torch.float32 for p in runner.plain_model.parameters())


# Runs


@pytest.mark.parametrize("expression", ["ours", "mtlora"])
def test_same_seed_same_run(trainer, card, dataset, tasks, tmp_path, expression):
    val = DenseDataset(card, "val", tuple(tasks), SIZE, limit=2)
    results = []
    for seed in (0, 0, 1):
        runner = trainer(expression, total=3, seed=seed)
        history = run(runner, dataset, tmp_path / "none").history
        results.append(
            (history, evaluate(runner.model, val, tasks, 2, 0, runner.accelerator, lambda *a: None), values(runner))
        )
    one, same, other = results
    assert one[:2] == same[:2]
    assert_same(one[2], same[2])
    assert one[0] != other[0]


def test_history_and_report(trainer, dataset, tasks, tmp_path):
    reported = []
    runner = trainer()
    history = run(runner, dataset, tmp_path / "c", lambda *args: reported.append(args)).history
    assert [(step, total) for step, total, _ in reported] == [(n, 6) for n in range(1, 7)]
    assert [loss for _, _, loss in reported] == [entry["loss"] for entry in history]
    for entry in history:
        assert set(entry) == {"step", "loss", "lr", *(f"loss/{task}" for task in tasks)}
        assert entry["loss"] == pytest.approx(sum(WEIGHTS[task] * entry[f"loss/{task}"] for task in tasks))
    assert not (tmp_path / "c").exists()


def test_long_runs_log_a_hundred_times(trainer, dataset, tmp_path, monkeypatch):
    runner = trainer(total=250)
    zero = {task: torch.tensor(0.0) for task in runner.plain_model.tasks}
    monkeypatch.setattr(runner, "step", lambda batch, step: zero)
    monkeypatch.setattr(DenseDataset, "__getitem__", lambda self, key: {"image": torch.zeros(3, *SIZE)})
    history = run(runner, dataset, tmp_path / "c").history
    assert [entry["step"] for entry in history] == list(range(2, 251, 2))


def interrupt(step, total, loss):
    if step == 3:
        raise KeyboardInterrupt


def send_signal(number):
    def report(step, total, loss):
        if step == 3:
            os.kill(os.getpid(), number)  # held back until the step is whole

    return report


@pytest.fixture
def no_escape():
    """Where a signal is not held back, the test fails and the test run goes on."""

    def escaped(number, frame):
        raise AssertionError("a signal reached the middle of a step")

    previous = {number: signal.signal(number, escaped) for number in (signal.SIGINT, signal.SIGTERM)}
    yield escaped
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("expression", "optimizer", "report"),
    [
        ("decoder_only", "adamw", interrupt),
        ("decoder_only", "adamw", send_signal(signal.SIGINT)),
        ("decoder_only", "adamw", send_signal(signal.SIGTERM)),
        ("single_task_full", "sgd", interrupt),
        ("ours", "adamw", interrupt),  # draws noise
        ("mtlora", "sgd", interrupt),  # draws dropout
    ],
)
def test_resumed_is_uninterrupted(trainer, dataset, tmp_path, no_escape, expression, optimizer, report):
    settings = {"optimizer": Optimizer(name=optimizer, lr=1e-3)}
    whole = trainer(expression, **settings)
    expected = run(whole, dataset, tmp_path / "unused")

    path = tmp_path / "run" / "checkpoint.safetensors"
    first = trainer(expression, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(first, dataset, path, report)
    assert path.exists()
    second = trainer(expression, **settings)
    torch.manual_seed(99)  # a fresh process stands elsewhere
    resumed = run(second, dataset, path)
    assert resumed.step == expected.step == 6
    assert resumed.history == expected.history
    assert_same(values(second), values(whole))


def test_what_was_found_before_training_is_what_a_resumed_run_trains_with(trainer, dataset, tmp_path, monkeypatch):
    """And it is not looked for again: on a GPU the gradients would differ a little, and with them the groups."""
    path = tmp_path / "checkpoint.safetensors"
    first, second = (trainer("progressive[groups=2]") for _ in range(2))
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        run(first, dataset, path, interrupt)
    monkeypatch.setattr(second.plain_model, "prepare", lambda losses: pytest.fail("looked for again"))
    resumed = run(second, dataset, path)
    order = [
        next(g for g, members in enumerate(resumed.preparation["groups"]) if task in members)
        for task in resumed.preparation["tasks"]
    ]
    assert second.plain_model.encoder.groups == first.plain_model.encoder.groups == order


def test_looking_at_data_first_takes_no_random_numbers(trainer, dataset, tmp_path, monkeypatch):
    first, second = trainer("mtlora"), trainer("mtlora")  # its dropout would show it
    monkeypatch.setattr(first.plain_model, "prepare", lambda losses: {"drawn": torch.rand(3).tolist()})
    histories = []
    for each in (first, second):
        torch.manual_seed(5)
        histories.append(run(each, dataset, tmp_path / str(len(histories))).history)
    assert histories[0] == histories[1]


def test_the_code_of_both_parts_of_a_resumed_run_is_known(trainer, dataset, tmp_path):
    def at_once(step, total, loss):
        raise KeyboardInterrupt

    path = tmp_path / "checkpoint.safetensors"
    for commit in ("first", "first", "second"):
        with pytest.raises(KeyboardInterrupt):
            run(trainer(), dataset, path, at_once, commit=commit)
    assert load_checkpoint(path, trainer()).commits == ["first", "second"]


def test_a_signal_during_a_step_does_not_cut_it(trainer, dataset, tmp_path, no_escape):
    runner, path = trainer(), tmp_path / "c.safetensors"
    step = runner.step

    def interrupted(batch, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batch, number)

    runner.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(runner, dataset, path)
    assert load_checkpoint(path, trainer()).step == 3
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is no_escape


def test_checkpoints_are_written_as_time_goes_by(trainer, dataset, tmp_path):
    path = tmp_path / "c.safetensors"
    runner = trainer(total=2)
    train(runner, dataset, 2, 0, path, -1, lambda *args: None)
    restored = trainer(total=2, seed=1)
    progress = load_checkpoint(path, restored)
    assert progress.step == 2 and len(progress.history) == 2
    assert_same(values(restored), values(runner))
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_finished_run_is_not_trained_further(trainer, dataset, tmp_path):
    path = tmp_path / "c.safetensors"
    runner = trainer(total=2)
    progress = run(runner, dataset, path)
    save_checkpoint(path, runner, progress)
    again = trainer(total=2)
    assert run(again, dataset, path, lambda *args: pytest.fail("went on")).history == progress.history
    assert_same(values(again), values(runner))


def saved(trainer, path, **settings):
    save_checkpoint(path, trainer(**settings), Progress())
    return path


@pytest.mark.parametrize(
    "other", [{"expression": "mtlora"}, {"expression": "ours[r=2]"}, {"tasks": {"semseg": 21}}], ids=str
)
def test_the_checkpoint_of_another_model_is_refused(trainer, tmp_path, other):
    path = saved(trainer, tmp_path / "c.safetensors", **other)
    with pytest.raises(BenchError, match=r"cannot resume from .*c\.safetensors.*another model") as caught:
        load_checkpoint(path, trainer("ours"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda b: b"no checkpoint", lambda b: b[: len(b) // 2], lambda b: b""])
def test_a_damaged_checkpoint_is_refused(trainer, tmp_path, damage):
    path = saved(trainer, tmp_path / "c.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BenchError, match="cannot resume from") as caught:
        load_checkpoint(path, trainer())
    assert "\n" not in str(caught.value)


def test_a_checkpoint_at_another_learning_rate_is_left_alone(trainer, tmp_path):
    """A cell that tunes its rate may choose another one after an interrupt: then it starts anew, and not half way."""
    path = tmp_path / "c.safetensors"
    first = trainer(seed=1)
    save_checkpoint(path, first, Progress(step=4))
    assert load_checkpoint(path, trainer()).step == 4
    other = trainer(optimizer=Optimizer(name="adamw", lr=7e-4))
    before = {name: value.clone() for name, value in other.plain_model.trained_state().items()}
    assert load_checkpoint(path, other).step == 0
    assert all(torch.equal(before[name], value) for name, value in other.plain_model.trained_state().items())


def test_a_checkpoint_that_cannot_be_written_is_an_error_in_one_line(trainer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BenchError, match="cannot write checkpoint") as caught:
        saved(trainer, tmp_path / "file" / "c.safetensors")
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_ends_the_run(trainer, dataset, tmp_path):
    runner = trainer()
    with torch.no_grad():
        runner.plain_model.decoder.heads["normals"].predict.bias.fill_(math.nan)
    with pytest.raises(DivergedError, match="^the loss of normals is not finite at step 1$"):
        run(runner, dataset, tmp_path / "c")


# Evaluation


def test_a_last_partial_batch_counts_as_it_should(trainer, card, tasks):
    """Seven images in batches of three and of seven."""
    runner = trainer("multi_task_full")
    val = DenseDataset(card, "val", tuple(tasks), SIZE, limit=7)
    seen = []
    (small, small_classes), (large, large_classes) = (
        evaluate(runner.model, val, tasks, size, 0, runner.accelerator, lambda *a: seen.append(a)) for size in (3, 7)
    )
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 1)]
    for task in tasks:
        assert small[task] == pytest.approx(large[task], rel=1e-3)
    assert set(small_classes) == {"semseg", "human_parts"} == set(large_classes)
    assert [len(small_classes[task]) for task in ("semseg", "human_parts")] == [21, 7]


def test_evaluation_leaves_the_model_as_it_was(trainer, card, tasks):
    runner = trainer("ours")
    before = values(runner)
    val = DenseDataset(card, "val", tuple(tasks), SIZE, limit=2)
    for training in (True, False):
        runner.model.train(training)
        evaluate(runner.model, val, tasks, 2, 0, runner.accelerator, lambda *args: None)
        assert runner.model.training == training
    assert_same(values(runner), before)


def test_a_model_that_predicts_nothing_finite_has_no_figures(trainer, card, tasks):
    """The last update may be the one that diverges: no loss is taken after it."""
    runner = trainer()
    val = DenseDataset(card, "val", tuple(tasks), SIZE, limit=3)
    with torch.no_grad():
        next(p for n, p in runner.model.named_parameters() if p.requires_grad and "semseg" in n).fill_(math.inf)
    with pytest.raises(DivergedError, match="predictions of semseg are not finite after training"):
        evaluate(runner.model, val, tasks, 2, 0, runner.accelerator, lambda *args: None)


def test_evaluation_scores_the_models_own_outputs(trainer, card, tasks):
    """A model that gives the labels back is perfect, one that gives their opposite is not."""
    runner = trainer()
    val = DenseDataset(card, "val", tuple(tasks), SIZE, limit=2)
    labels = {task: torch.stack([val[i][task] for i in range(2)]) for task in tasks}

    class Oracle(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def forward(self, image):
            hot = {
                t: torch.nn.functional.one_hot(labels[t] % 255, n).permute(0, 3, 1, 2)
                for t, n in tasks.items()
                if t in ("semseg", "human_parts")
            }
            rest = {"saliency": 20 * labels["saliency"][:, None] - 10, "normals": labels["normals"]}
            return {task: self.sign * out for task, out in (hot | rest).items()}

    def scores(sign):
        values, _ = evaluate(Oracle(sign), val, tasks, 2, 0, runner.accelerator, lambda *args: None)
        return {task: next(iter(figures.values())) for task, figures in values.items()}

    perfect, opposite = scores(1), scores(-1)
    parts = 100 if (labels["human_parts"] != 255).any() else math.nan
    expected = {"semseg": 100, "human_parts": parts, "saliency": 100, "normals": 0}
    assert perfect == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert opposite["semseg"] < 1 and opposite["saliency"] < 50 and opposite["normals"] == pytest.approx(180, abs=1e-3)


# at original size


@pytest.fixture
def odd(tmp_path):
    """Three validation images of different sizes with classes, depth and a mask."""
    card = {
        "name": "odd", "title": "Odd sizes", "image_size": list(SIZE), "image": "{id}.png",
        "splits": {"train": "ids.txt", "val": "ids.txt"},
        "tasks": {
            "semseg": {"path": "{id}-seg.png", "classes": ["a", "b", "c"]},
            "saliency": {"path": "{id}-sal.png"},
            "depth": {"path": "{id}-depth.npy"},
        },
    }  # fmt: skip
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(card))
    (tmp_path / "ids.txt").write_text("x y z")
    generator = np.random.default_rng(0)
    for name, size in zip("xyz", ((30, 47), (64, 21), (32, 32)), strict=True):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")
        Image.fromarray(generator.integers(0, 3, size).astype(np.uint8)).save(tmp_path / f"{name}-seg.png")
        Image.fromarray(generator.integers(0, 2, size).astype(np.uint8)).save(tmp_path / f"{name}-sal.png")
        np.save(tmp_path / f"{name}-depth.npy", generator.uniform(1, 5, size))
    return tmp_path


@pytest.mark.parametrize("batch", [1, 2, 3])
@torch.no_grad()
def test_evaluation_at_original_size_image_by_image(trainer, odd, batch):
    """Predictions are resized to each label, whatever the batches; labels are not touched."""
    card = cards.load(str(odd / "odd.yaml"))
    channels = card.channels(tuple(card.tasks))
    runner = trainer(tasks=channels)
    val = DenseDataset(card, "val", tuple(channels), SIZE, odd, original_labels=True)
    ours, _ = evaluate(runner.model, val, channels, batch, 0, runner.accelerator, lambda *args: None)
    accumulators = {task: metrics.make(task, n) for task, n in channels.items()}
    runner.model.eval()
    for index in range(3):
        sample = val[index]
        assert sample["image"].shape[-2:] == SIZE
        assert sample["semseg"].shape == ((30, 47), (64, 21), (32, 32))[index]
        outputs = runner.model(sample["image"][None])
        for task, accumulator in accumulators.items():
            size = sample[task].shape[-2:]
            resized = torch.nn.functional.interpolate(outputs[task], size, mode="bilinear", align_corners=False)
            accumulator.update(resized, sample[task][None])
    for task, accumulator in accumulators.items():
        assert ours[task] == pytest.approx(accumulator.compute(), rel=1e-6)

    network = DenseDataset(card, "val", tuple(channels), SIZE, odd)
    theirs, _ = evaluate(runner.model, network, channels, batch, 0, runner.accelerator, lambda *args: None)
    assert theirs["depth"]["rmse"] != ours["depth"]["rmse"]

    three = {"depth": torch.full((1, 1, 1), 3.0)}
    (floor,) = score_floors([three], validation_batches(val, batch, 0, pin=False), {"depth": 1})
    truth = torch.cat([val[i]["depth"].flatten() for i in range(3)])
    assert floor["depth"]["rmse"] == pytest.approx((truth - 3).square().mean().sqrt().item(), rel=1e-5)


# before training


def test_losses_before_training_change_nothing(trainer, dataset):
    """As many batches as are asked for, each with a graph; neither weights nor running statistics move."""
    made = trainer("progressive", total=2)
    before = {name: tensor.clone() for name, tensor in made.plain_model.state_dict().items()}
    batches = losses_by_batch(made, dataset, 2)
    seen = [next(batches) for _ in range(5)]
    assert all(loss.requires_grad and loss.isfinite() for losses in seen for loss in losses.values())
    assert not torch.equal(seen[0]["semseg"], seen[1]["semseg"])
    batches.close()
    assert made.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.plain_model.state_dict().items())


def test_grouping_of_real_losses_reaches_the_model(trainer, dataset, tasks):
    made = trainer("progressive[groups=2]", total=2)
    found = made.plain_model.prepare(losses_by_batch(made, dataset, 2))
    similarity = torch.tensor(found["similarity"])
    torch.testing.assert_close(similarity, similarity.T)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(4))
    assert sorted(sum(found["groups"], [])) == sorted(tasks)
    order = [next(g for g, members in enumerate(found["groups"]) if task in members) for task in tasks]
    assert made.plain_model.encoder.group_of_task.tolist() == order
