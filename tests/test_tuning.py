"""Learning rates: which images are held out, what a trial is scored by, and a run that tunes."""

import math
import signal
import subprocess
import sys

import pytest
from pydantic import ValidationError

from bench import record as records
from bench import resources, sweep
from bench.recipe import Recipe, Tuning
from bench.record import Failure
from bench.tasks import delta_m
from bench.tuning import choose, held_out, next_rate, score
from tests.report import records as make
from tests.test_sweep import RECIPE, asked, at_step, bench, found

TUNE = {"rates": [1e-5, 1e-2], "length": 0.5, "holdout": 0.34}
TUNED = {"optimizer": {"name": "adamw"}, "tune": TUNE, "steps": 12}


# which images


@pytest.mark.parametrize("count", [2, 3, 7, 8, 40, 241, 795])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_held_out_images_are_runs_of_about_the_share(count, share):
    names = [f"{i:04}" for i in range(count)]
    kept, out = held_out(names, share)
    assert sorted(kept + out) == names and kept == sorted(kept) and out == sorted(out) and kept and out
    assert len(out) == min(max(1, round(count * share)), count - 1)
    runs = sum(int(b) - int(a) > 1 for a, b in zip(out, out[1:], strict=False)) + 1
    assert runs <= 8


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="1 image cannot be split"):
        held_out(["a"], 0.2)


# which rate


def trial(tmp_path, rate, figures, **changes):
    recipe = make.recipe(optimizer={"name": "adamw", "lr": rate})
    path = make.make(
        tmp_path / f"{rate}", figures=figures, recipe=recipe, trial={"length": 0.25, "holdout": 0.2}, **changes
    )
    return records.read(path)


def test_scores_differ_by_delta_m(tmp_path):
    """To first order, as the docstring says; the reference drops out."""
    a = {"semseg": 50.0, "normals": 20.0, "depth": 0.8}
    b = {"semseg": 50.1, "normals": 19.98, "depth": 0.801}
    difference = score(trial(tmp_path, 1e-3, b)) - score(trial(tmp_path, 1e-4, a))
    assert 100 * difference == pytest.approx(delta_m(b, a), rel=0.02)
    assert difference == pytest.approx((math.log(50.1 / 50) - math.log(19.98 / 20) - math.log(0.801 / 0.8)) / 3)


def test_the_best_rate_is_chosen_and_the_smaller_of_equals(tmp_path):
    good, bad = {"semseg": 50.0, "normals": 20.0}, {"semseg": 50.0, "normals": 21.0}
    trials = [trial(tmp_path, 1e-2, good), trial(tmp_path, 1e-4, bad), trial(tmp_path, 1e-3, good)]
    tuned = choose(trials)
    assert tuned.rate == 1e-3 and [each.rate for each in tuned.tried] == [1e-2, 1e-4, 1e-3]
    assert tuned.tried[1].figures == bad
    assert tuned.tried[1].metrics == {"semseg": "mIoU", "normals": "mean_error"}


def test_trials_are_scored_by_a_metric_that_all_of_them_have(tmp_path):
    """One was kept from before odsF was measured: that it has the larger max F decides, whatever the other's odsF."""

    def edges(rate, figures):
        return trial(tmp_path, rate, {"edge": 1.0}, metrics={"edge": figures})

    old, new = edges(1e-3, {"max_f": 16.0}), edges(1e-2, {"ods_f": 60.0, "max_f": 15.0})
    tuned = choose([old, new])
    assert tuned.rate == 1e-3 and [each.figures["edge"] for each in tuned.tried] == [16.0, 15.0]
    assert {each.metrics["edge"] for each in tuned.tried} == {"max_f"}
    tuned = choose([edges(1e-3, {"ods_f": 50.0, "max_f": 16.0}), new])
    assert tuned.rate == 1e-2 and [each.figures["edge"] for each in tuned.tried] == [50.0, 60.0]


def test_what_has_no_figure_is_never_chosen(tmp_path):
    dead = trial(tmp_path, 1e-2, {"semseg": 0.0, "normals": 20.0}, status="failed")
    diverged = trial(tmp_path, 1e-1, {"semseg": 90.0, "normals": 1.0}, status="diverged")
    partial = trial(tmp_path, 1, {"semseg": 90.0, "normals": 1.0}, metrics={"semseg": {"mIoU": 90.0}})
    fine = trial(tmp_path, 1e-3, {"semseg": 1.0, "normals": 40.0})
    assert [score(each) for each in (dead, diverged, partial)] == [None] * 3
    assert choose([diverged, partial, fine]).rate == 1e-3
    none = choose([partial, diverged])
    assert none.rate is None and "no learning rate came to a score" in none.reason


def test_a_rate_that_finds_nothing_in_a_task_is_chosen_by_the_others_if_at_all(tmp_path):
    """As odsF has it where no line is drawn yet."""
    nothing = [trial(tmp_path, rate, {"edge": 0.0, "depth": d}) for rate, d in ((1e-3, 1.0), (1e-2, 0.9), (1e-1, 1.1))]
    assert choose(nothing).rate == 1e-2
    assert score(nothing[0]) == pytest.approx((math.log(1e-3) - math.log(1.0)) / 2)
    little = trial(tmp_path, 1, {"edge": 0.1, "depth": 1.2})
    assert choose([*nothing, little]).rate == 1
    less = trial(tmp_path, 2, {"edge": 1e-5, "depth": 1.0})
    assert score(less) == score(nothing[0])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1e-3: 1}, 1e-2),  # of the recipe, in its order
        ({1e-3: 1, 1e-2: 2}, 4e-3),
        ({1e-3: 1, 1e-2: 2, 4e-3: 3}, None),  # inside
        ({1e-3: 3, 1e-2: 1, 4e-3: 2}, 2.5e-4),  # 1e-3 / 4
        ({1e-3: 1, 1e-2: 3, 4e-3: 2}, 2.5e-2),  # 1e-2 * 2.5
        ({1e-3: 3, 1e-2: 1, 4e-3: 2, 2.5e-4: 1}, None),
        ({1e-3: 3, 1e-2: 1, 4e-3: 2, 2.5e-4: 4}, 6.25e-5),
        ({1e-3: 3, 1e-2: 1, 4e-3: 2, 2.5e-4: 4, 6.25e-5: 5}, None),  # two and no more
        ({1e-3: None, 1e-2: None, 4e-3: None}, None),  # none has a score
    ],
)
def test_beyond_the_edge_is_tried_where_the_best_is_there(tmp_path, scores, expected):
    tuning = Tuning(rates=[1e-3, 1e-2, 4e-3], extend=2)
    found = [trial(tmp_path, rate, {"semseg": value and 10.0 * value}) for rate, value in scores.items()]
    assert next_rate(tuning, found) == expected
    if len(found) >= 3:
        assert next_rate(Tuning(rates=tuning.rates), found) is None


def test_how_far_rates_may_be_extended_makes_a_cell_of_its_own_in_the_same_table(tmp_path):
    for seed, more in enumerate(({}, {"extend": 1})):
        tuned = make.recipe(optimizer={"name": "adamw"}, tune=TUNE | more)
        make.make(tmp_path, "ours", recipe=tuned, seed=seed)
    (group,) = make.groups(tmp_path)
    assert len({item.record.spec.hash for item in group.found}) == 2
    assert any("not tuned alike" in mark for mark in group.marks)


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "interrupted"])
def test_a_trial_that_failed_of_itself_is_no_reason_to_choose_another_rate(tmp_path, status):
    """Its rate might have been the best: what happened to it says nothing of that."""
    fine = trial(tmp_path, 1e-3, {"semseg": 50.0})
    bad = trial(tmp_path, 1e-2, {"semseg": 50.0}, status=status, failure=Failure(kind="signal", message="killed"))
    tuned = choose([fine, bad])
    assert tuned.rate is None and "0.01" in tuned.reason and "killed" in tuned.reason and "--retry" in tuned.reason


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tune": TUNE}, "exactly one of optimizer.lr and tune"),
        ({"optimizer": {"name": "adamw"}}, "exactly one of optimizer.lr and tune"),
        (TUNED | {"tune": TUNE | {"rates": [1e-3]}}, "one rate is nothing to choose from; write optimizer"),
        (TUNED | {"tune": TUNE | {"rates": [1e-3, 1e-3]}}, "twice"),
        (TUNED | {"tune": TUNE | {"holdout": 1}}, "less than 1"),
    ],
)
def test_recipes_that_tune_nothing_or_wrongly_are_refused(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        Recipe(**(RECIPE | changes))


def test_old_records_keep_their_hash():
    """Records of before there was tuning are found again: their file names are the hashes of that time."""
    paths = sorted(resources.ROOT.glob("results/measured/cpu/nyud_v2/tf_efficientnet_lite0.in1k/*/*.json"))
    old = [(path, records.read(path).spec) for path in paths if "tuned" not in path.read_text()]
    assert len(old) >= 7 and all(path.name == spec.relative_path().name for path, spec in old)
    _, spec = old[0]
    for change in ({"trial": {"length": 0.25, "holdout": 0.2}}, {"shuffled_labels": True}):
        assert type(spec).model_validate(spec.model_dump() | change).hash != spec.hash
    optimizer = spec.recipe.optimizer.model_dump()
    for factor in ("backbone_factor", "adaptation_factor"):
        recipe = spec.recipe.model_dump() | {"optimizer": optimizer | {factor: 0.5}}
        assert type(spec).model_validate(spec.model_dump() | {"recipe": recipe}).hash != spec.hash


# a run


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    args = (*asked(folder, **TUNED), "--seeds", "0,1", "--out", folder / "runs")
    first = bench(*args)
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.json")}
    again = bench(*args)
    touched = {path for path in (folder / "runs").rglob("*.json") if stamps.get(path) != path.stat().st_mtime_ns}
    return {"out": folder / "runs", "first": first, "again": again, "touched": touched, "args": args}


def parts(out):
    everything = found(out)
    return [r for r in everything if r.spec.trial], [r for r in everything if not r.spec.trial]


def test_each_rate_is_tried_once_for_all_seeds(tuned):
    assert tuned["first"].exit_code == 0, tuned["first"].output
    tried, cells = parts(tuned["out"])
    assert sorted(r.spec.recipe.optimizer.lr for r in tried) == TUNE["rates"]
    assert {r.spec.seed for r in tried} == {0} and {r.spec.seed for r in cells} == {0, 1}
    assert len({r.spec.hash for r in cells}) == 1 and not tuned["touched"] and tuned["again"].exit_code == 0
    assert {r.history[-1]["step"] for r in tried} == {6} and {r.history[-1]["step"] for r in cells} == {12}


def test_a_cell_trains_with_the_best_rate_and_says_so(tuned):
    tried, cells = parts(tuned["out"])
    best = max(tried, key=score)
    for cell in cells:
        assert cell.tuned == choose(sorted(tried, key=lambda r: r.spec.recipe.optimizer.lr))
        assert cell.history[0]["lr"] == pytest.approx(best.spec.recipe.optimizer.lr, rel=0.05)  # cosine, a step in
    shown = bench("show", cells[0].spec.hash + "-s0", tuned["out"])
    assert "trained with" in shown.output and "trial of 1e-05" in shown.output


def test_a_trial_is_scored_on_training_images_that_it_did_not_train_on(tuned):
    """The trial again, by hand: trained on the images kept, evaluated on those held out."""
    import torch
    from accelerate import Accelerator

    from bench.data import card as cards
    from bench.data.loader import DenseDataset
    from bench.train.evaluation import evaluate
    from bench.train.loop import Trainer, train
    from methods.backbones.load import WeightSource, load_backbone
    from methods.model import Setting
    from methods.registry import parse

    tried, _ = parts(tuned["out"])
    spec = tried[0].spec
    card = cards.load(spec.dataset)
    names = DenseDataset(card, "train", spec.tasks, spec.image_size, limit=spec.limit_train).names
    kept, held = held_out(names, 0.34)
    assert (len(kept), len(held)) == (4, 2)
    channels = card.channels(spec.tasks)
    torch.manual_seed(0)
    (method,) = parse(spec.method)
    model = method.build(
        load_backbone(spec.backbone, spec.image_size, WeightSource("random")), channels, Setting("published", None)
    )
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(model, spec.recipe, 2, 6, accelerator)
    torch.manual_seed(0)
    how = {"augment": spec.recipe.augment, "seed": 0}
    inner = DenseDataset(card, "train", spec.tasks, spec.image_size, names=kept, **how)
    train(trainer, inner, 2, 0, tuned["out"] / "none", 1e9, lambda *a: None)
    outer = DenseDataset(card, "train", spec.tasks, spec.image_size, names=held)
    values, _ = evaluate(trainer.model, outer, channels, 2, 0, accelerator, lambda *a: None)
    for task in spec.tasks:
        assert tried[0].metrics[task] == pytest.approx(values[task], rel=1e-4)


def test_reports_show_the_rates_and_no_trial(tuned):
    shown = bench("report", tuned["out"])
    assert shown.exit_code == 0 and "Learning rates" in shown.output
    assert "2 records in 1 groups" in (tuned["out"] / "report" / "report.md").read_text()
    assert shown.output.count("Table 1.") == 1 and "edge of what was tried" in " ".join(shown.output.split())
    _, cells = parts(tuned["out"])
    lost = {each.rate: each.score for each in cells[0].tuned.tried}
    worst = 100 * (math.exp(min(lost.values()) - max(lost.values())) - 1)
    assert f"{worst:+.2f}" in shown.output


def test_only_trials_are_nothing_to_report(tuned, tmp_path):
    tried, _ = parts(tuned["out"])
    tried[0].write(tmp_path)
    shown = bench("report", tmp_path)
    assert shown.exit_code == 2 and "only trials of learning rates" in " ".join(shown.output.split())


def test_a_run_goes_on_beyond_the_edge(tmp_path):
    """As far as the rule says, for all seeds at once; the report has a column for each rate."""
    few = {"steps": 4, "tune": TUNE | {"rates": [1e-6, 1e-5], "extend": 2}}
    assert bench(*asked(tmp_path, **(TUNED | few)), "--seeds", "0,1", "--out", tmp_path / "runs").exit_code == 0
    tried, cells = parts(tmp_path / "runs")
    by_rate = {r.spec.recipe.optimizer.lr: r for r in tried}
    for cell in cells:
        rates = [each.rate for each in cell.tuned.tried]
        assert rates[:2] == [1e-6, 1e-5] and set(rates) == set(by_rate) and cell.tuned.rate in rates
        assert next_rate(cell.spec.recipe.tune, [by_rate[rate] for rate in rates]) is None
        assert len(rates) == 4 or cell.tuned.rate not in (min(rates), max(rates))
    assert len(cells) == 2 and len(tried) > 2
    shown = " ".join(bench("report", tmp_path / "runs").output.split())
    assert "the same 2 learning rates, some whose best was at the edge others beyond it, for" in shown
    dry = bench(*asked(tmp_path, **(TUNED | few)), "--dry-run", "--out", tmp_path / "runs").output
    assert "1e-06 or 1e-05 (and up to 2 beyond)" in " ".join(dry.split())


def test_no_rate_that_works_is_a_diverged_cell_with_its_cost(tmp_path):
    args = asked(tmp_path, **(TUNED | {"tune": TUNE | {"rates": [1e30, 1e35]}, "steps": 400, "clip_norm": None}))
    result = bench(*args, "--out", tmp_path / "runs", "--seeds", "3")
    assert result.exit_code == 1
    tried, (cell,) = parts(tmp_path / "runs")
    assert [r.status for r in tried] == ["diverged"] * 2
    assert cell.status == "diverged" and "no learning rate came to a score" in cell.failure.message
    assert "not finite" in cell.failure.message and cell.time and cell.parameters and not cell.history
    shown = " ".join(bench("report", tmp_path / "runs").output.split())
    assert "1e+30: diverged; 1e+35: diverged" in shown
    assert bench("show", cell.spec.hash, tmp_path / "runs").exit_code == 0


def test_a_killed_trial_fails_its_cell_until_it_is_tried_again(tmp_path):
    args = (*asked(tmp_path, **(TUNED | {"steps": 40})), "--out", tmp_path / "runs")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, signal.SIGKILL)
        assert bench(*args).exit_code == 1
    tried, (cell,) = parts(tmp_path / "runs")
    assert sorted(r.status for r in tried) == ["failed", "ok"] and cell.status == "failed"
    assert "killed by SIGKILL" in cell.failure.message and cell.time and not cell.metrics
    assert bench(*args, "--retry").exit_code == 0
    tried, (cell,) = parts(tmp_path / "runs")
    assert cell.status == "ok" and [each.status for each in cell.tuned.tried] == ["ok", "ok"]
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("*.json"))]
    assert bench(*args, "--retry").exit_code == 0
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("*.json"))]


def test_a_trial_that_somebody_else_interrupts_goes_on_the_next_time(tmp_path):
    args = (*asked(tmp_path, **(TUNED | {"steps": 40})), "--out", tmp_path / "runs")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, signal.SIGTERM)
        assert bench(*args).exit_code == 1
    _, (cell,) = parts(tmp_path / "runs")
    assert cell.status == "interrupted" and not cell.metrics
    again = bench(*args)
    assert again.exit_code == 0 and "resuming  decoder_only" in again.output and "trial of lr 1e-05" in again.output
    tried, (cell,) = parts(tmp_path / "runs")
    assert cell.status == "ok" and all(r.status == "ok" and r.history[-1]["step"] == 20 for r in tried)


def test_running_anew_loses_nothing_to_an_interrupted_trial(tmp_path):
    args = (*asked(tmp_path, **TUNED), "--out", tmp_path / "runs")
    assert bench(*args).exit_code == 0
    _, (before,) = parts(tmp_path / "runs")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, signal.SIGTERM)
        assert bench(*args, "--fresh").exit_code == 1
    _, (after,) = parts(tmp_path / "runs")
    assert after == before
    next((tmp_path / "runs").rglob(f"{before.spec.hash}-s0.json")).unlink()
    assert "kept" in (said := bench(*args).output) and "other code" not in said
    next((tmp_path / "runs").rglob(f"{before.spec.hash}-s0.json")).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.code, "fingerprint", lambda expression: "another")
        assert bench(*args).output.count("images, measured by other code") == 2


def test_interrupted_trials_go_on(tmp_path, tuned):
    """The same figures as without an interrupt, and no trial twice."""
    command = [sys.executable, "-m", "bench", *map(str, asked(tmp_path, **TUNED)), "--out", str(tmp_path / "runs")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while not list((tmp_path / "runs").rglob("*.json")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json") if records.read(p).status == "ok"}
    done = bench(*asked(tmp_path, **TUNED), "--out", tmp_path / "runs")
    assert done.exit_code == 0 and stamps and all(p.stat().st_mtime_ns == s for p, s in stamps.items())
    _, (cell,) = parts(tmp_path / "runs")
    _, whole = parts(tuned["out"])
    assert cell.metrics == next(r for r in whole if r.spec.seed == 0).metrics
    assert not list((tmp_path / "runs").rglob("*.lock"))


def test_two_sweeps_at_once_share_the_trials(tmp_path):
    """One of them waits for the other's, and neither writes into the other's files."""
    base = [sys.executable, "-m", "bench", *map(str, asked(tmp_path, **TUNED)), "--out", str(tmp_path / "runs")]
    both = [
        subprocess.Popen([*base, "--seeds", seed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for seed in "01"
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting" in text for text in said) >= 1
    assert (
        sum(text.count("tried  decoder_only") for text in said) == 2 == sum(t.count("kept  decoder_only") for t in said)
    )
    tried, cells = parts(tmp_path / "runs")
    assert len(tried) == 2 and {r.spec.seed for r in cells} == {0, 1} and len({r.tuned.rate for r in cells}) == 1


def test_seeds_at_different_rates_are_marked(tmp_path):
    for seed, rate in enumerate((1e-3, 1e-2)):
        each = {"rate": rate, "tried": [{"rate": rate, "status": "ok", "score": 1.0, "commits": [str(seed) * 40]}]}
        make.make(tmp_path, "ours", recipe=make.recipe(optimizer={"name": "adamw"}, tune=TUNE), seed=seed, tuned=each)
    shown = " ".join(make.report(tmp_path).split())
    assert "seeds of ours were trained at different learning rates: 0.001, 0.01" in shown
    assert "rows come from different commits: 0000000000, 1111111111" in shown  # of their trials


@pytest.mark.parametrize(("method", "backbone", "told"), [("single_task_full", 7, True), ("ours", 0, False)])
def test_the_backbones_share_is_told_where_a_backbone_is_trained_whole(tmp_path, method, backbone, told):
    slowed = make.recipe(optimizer={"name": "adamw", "backbone_factor": 0.1}, tune=TUNE)
    counts = dict.fromkeys(("total", "trainable", "adaptation", "decoder", "shared", "per_task"), 9)
    tried = {"rate": 1e-3, "tried": [{"rate": 1e-3, "status": "ok", "score": 1.0}]}
    make.make(tmp_path, method, recipe=slowed, tuned=tried, parameters=counts | {"backbone": backbone})
    assert ("trained whole learns at 0.1 of the rate" in " ".join(make.report(tmp_path).split())) == told


@pytest.mark.parametrize(("factor", "told"), [(0.1, True), (1.0, False)])
def test_a_share_for_what_a_method_adds_is_told(tmp_path, factor, told):
    apart = make.recipe(optimizer={"name": "adamw", "adaptation_factor": factor}, tune=TUNE)
    tried = {"rate": 1e-3, "tried": [{"rate": 1e-3, "status": "ok", "score": 1.0}]}
    make.make(tmp_path, "ours", recipe=apart, tuned=tried)
    shown = " ".join(make.report(tmp_path).split())
    assert ("What a method adds outside the decoder, or unfreezes, learns at 0.1 of the rate" in shown) == told


def test_mixing_one_setting_keeps_its_rates(tuned):
    assert "Learning rates" in bench("report", tuned["out"], "--mix").output


def test_shuffling_is_refused_where_nothing_is_trained(tmp_path):
    result = bench(*asked(tmp_path), "--steps", "0", "--shuffle-labels", "--out", tmp_path / "runs")
    assert result.exit_code == 2 and "--shuffle-labels says nothing" in result.output


def test_efficiency_alone_tunes_nothing(tmp_path):
    result = bench(*asked(tmp_path, **TUNED), "--steps", "0", "--out", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    (cell,) = found(tmp_path / "runs")
    assert cell.tuned is None and cell.time


# a control


def test_from_shuffled_labels_nothing_is_gained(tmp_path):
    """Trained on other images' labels, a model is no better than the best prediction that looks at no image; trained on
    its own, it is better than that."""
    few = {"steps": 120, "limit_train": 24, "limit_val": 24, "batch_size": 4, "augment": {"hflip": 0.5}}
    args = (*asked(tmp_path, **few), "--image-size", "64", "--out", tmp_path / "runs")
    assert bench(*args).exit_code == 0 and bench(*args, "--shuffle-labels").exit_code == 0
    by_control = {record.spec.shuffled_labels: record for record in found(tmp_path / "runs")}
    assert len({record.spec.hash for record in by_control.values()}) == 2
    own, control = (by_control[flag].metrics for flag in (False, True))
    blind = by_control[True].floor_map
    assert blind == by_control[False].floor_map and blind["depth"]["rmse"] < by_control[True].floor["depth"]["rmse"]

    def error(metrics):
        return metrics["depth"]["rmse"]

    def hits(metrics):
        return metrics["semseg"]["mIoU"]

    assert error(control) > 0.97 * error(blind) and hits(control) < 1.1 * hits(blind)
    assert error(own) < 0.95 * error(control) and hits(own) > 1.05 * hits(control)
    shown = " ".join(bench("report", tmp_path / "runs").output.split())
    assert "SHUFFLED LABELS" in shown and "Constant per pixel" in shown and "Group 2 of 2" in shown


def test_a_trial_that_diverged_has_no_say_in_the_metric(tmp_path):
    def edges(rate, figures, **more):
        return trial(tmp_path, rate, {"edge": 1.0}, metrics={"edge": figures}, **more)

    good = [edges(1e-3, {"ods_f": 60.0, "max_f": 15.0}), edges(1e-2, {"ods_f": 50.0, "max_f": 16.0})]
    tuned = choose([*good, edges(1e-1, {"max_f": 1.0}, status="diverged")])
    assert tuned.rate == 1e-3 and {each.metrics["edge"] for each in tuned.tried} == {"ods_f"}
