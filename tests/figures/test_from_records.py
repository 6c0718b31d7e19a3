"""Figures from records: what is drawn is what the records say."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from typer.testing import CliRunner

from bench.cli import app
from bench.errors import BenchError
from bench.figures import from_records
from bench.figures.from_records import FIGURES, Choice
from bench.figures.style import COLOURS, legend_below, look, panels
from bench.record import Estimated, Memory, MethodInfo
from bench.report import tables
from bench.report.front import front
from tests.report.records import groups, make

FOUR = {"semseg": 70.0, "human_parts": 60.0, "saliency": 65.0, "normals": 16.0}
GIB = 2**30


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(name, folder, **choice):
    return [figure for _, figure in FIGURES[name](groups(folder), Choice(**choice))]


def points(axis):
    return {
        box.get_label(): tuple(float(v[0]) for v in box.lines[0].get_data())
        for box in axis.containers
        if hasattr(box, "lines")
    }


def test_front_by_brute_force():
    rng = random.Random(0)
    for _ in range(50):
        found = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(12)]
        dominated = {p for p, q in itertools.product(found, found) if p != q and q[0] <= p[0] and q[1] >= p[1]}
        assert front(found) == sorted(set(found) - dominated)


def test_looks_are_told_apart():
    assert len({look(i)[:2] for i in range(64)}) == 64 and len(set(COLOURS)) == 8


def test_pareto_draws_every_method_at_its_figures(tmp_path):
    make(tmp_path, "single_task_full", FOUR)
    make(tmp_path, "ours", FOUR | {"semseg": 77.0})
    (figure,) = drawn("pareto", tmp_path)
    parameters, memory, seconds = figure.axes
    assert points(parameters)["Ours"] == pytest.approx((2.362108, 2.5))
    assert points(memory)["Ours"] == pytest.approx((5.0, 2.5)) and "CPU" in memory.get_xlabel()
    assert points(seconds)["Ours"] == pytest.approx((5.5, 2.5))
    assert "scenes" in figure.get_suptitle()


def test_pareto_across_devices_is_of_parameters_alone(tmp_path):
    make(tmp_path, "single_task_full", FOUR)
    make(tmp_path, "ours", FOUR | {"semseg": 77.0}, device_name="Another CPU")
    found = groups(tmp_path, any_device=True)
    ((_, figure),) = FIGURES["pareto"](found, Choice(any_device=True))
    (parameters,) = figure.axes
    assert points(parameters)["Ours"] == pytest.approx((2.362108, 2.5))


def test_pareto_without_a_baseline_says_what_to_do(tmp_path):
    make(tmp_path, "ours", FOUR)
    make(tmp_path, "mtlora", FOUR | {"semseg": 63.0})
    with pytest.raises(BenchError, match="run single_task_full .* or name another method with --reference"):
        drawn("pareto", tmp_path)
    (figure,) = drawn("pareto", tmp_path, reference="ours")
    assert points(figure.axes[0])["MTLoRA"][1] == pytest.approx(-2.5) and "ours" in figure.axes[0].get_ylabel()


def test_memory_says_whether_it_was_measured(tmp_path):
    phases = {"forward": GIB, "loss": 2 * GIB, "backward": 3 * GIB, "optimizer": GIB // 2}
    peak = Memory(device="cuda", peak_allocated=3 * GIB, peak_reserved=4 * GIB, phases=phases)
    make(tmp_path / "gpu", "ours", FOUR, device="nvidia-h200", memory=peak)
    (figure,) = drawn("memory", tmp_path / "gpu")
    widths = [bar.get_width() for bars in figure.axes[0].containers for bar in bars]
    assert widths == [1, 2, 3, 0.5] and "measured" in figure.axes[0].get_xlabel()
    make(tmp_path / "cpu", "ours", FOUR, estimate=Estimated(peak=3 * GIB, phases=phases))
    (figure,) = drawn("memory", tmp_path / "cpu")
    assert "estimated for a CUDA GPU, not measured" in figure.axes[0].get_xlabel()


def option(method, title, **options):
    info = MethodInfo(name=method, title=title, family="multi-task PEFT", options=options)
    return {"method": info, "title": title}


def with_option(folder, r, value, **changes):
    expression = "ours" if r == 4 else f"ours[r={r}]"
    path = make(folder, expression, FOUR | {"semseg": value}, **changes)
    text = path.read_text()
    path.write_text(text.replace('"options": {}', f'"options": {{"r": {r}, "mote": true}}').replace(
        f'"name": "{expression}"', '"name": "bdta_mote"').replace('"name": "ours"', '"name": "bdta_mote"'))  # fmt: skip


def test_a_sweep_draws_an_options_values_in_order_a_line_a_backbone(tmp_path):
    make(tmp_path, "single_task_full", FOUR)
    for r, value in ((8, 77.0), (2, 84.0), (4, 70.0)):
        with_option(tmp_path, r, value)
    (figure,) = drawn("sweep", tmp_path, option="r")
    (line,) = (box.lines[0] for box in figure.axes[0].containers)
    assert line.get_xdata().tolist() == [2, 4, 8] and line.get_ydata().tolist() == pytest.approx([5, 0, 2.5])
    assert figure.axes[0].get_xlabel() == "r of bdta_mote"
    with pytest.raises(BenchError, match="several values of option rho"):
        drawn("sweep", tmp_path, option="rho")


@pytest.mark.parametrize(("values", "scale"), [((2, 4, 8), "log"), ((0, 0.1, 0.2), "linear"), ((0.1, 0.2), "linear")])
def test_values_of_a_sweep_have_room(tmp_path, values, scale):
    """A zero has no logarithm, and neighbours need none."""
    make(tmp_path, "single_task_full", FOUR)
    for value in values:
        path = make(tmp_path, f"lora[dropout={value}]", FOUR | {"semseg": 80.0 + value})
        path.write_text(path.read_text().replace('"options": {}', f'"options": {{"dropout": {value}}}'))
    (figure,) = drawn("sweep", tmp_path, option="dropout")
    axis = figure.axes[0]
    assert axis.get_xscale() == scale and axis.get_xticks().tolist() == list(values)
    places = [axis.transData.transform((value, 0))[0] for value in values]
    assert all(b - a > 20 for a, b in itertools.pairwise(places))


def test_ablation_sets_backbones_side_by_side(tmp_path):
    small = "swin_small_patch4_window7_224.ms_in1k"
    for backbone, value in ((None, 77.0), (small, 84.0)):
        changes = {"backbone": backbone} if backbone else {}
        make(tmp_path, "single_task_full", FOUR, **changes)
        make(tmp_path, "ours", FOUR | {"semseg": value}, **changes)
    (figure,) = drawn("ablation", tmp_path)
    heights = {box.get_label(): [bar.get_height() for bar in box] for box in figure.axes[0].containers}
    assert {k.partition("_patch4")[0]: v for k, v in heights.items()} == {
        "swin_tiny": pytest.approx([2.5]), "swin_small": pytest.approx([5.0]),
    }  # fmt: skip


def test_gradient_cosines_are_counted(tmp_path):
    make(tmp_path, "ours", FOUR, cosines={"semseg,normals": [0.1, -0.1, 0.2], "semseg,saliency": [0.3]})
    (figure,) = drawn("gradients", tmp_path)
    (handle,) = figure.axes[0].get_legend_handles_labels()[1]
    assert handle == "Ours, 3 probes: 25% below 0"
    heights = figure.axes[0].patches[0].get_xy()[:, 1]
    assert heights.max() == pytest.approx(25)


def test_similarity_writes_its_matrix(tmp_path):
    found = {"tasks": ["semseg", "normals"], "similarity": [[1.0, -0.004], [-0.004, 1.0]],
             "groups": [["semseg"], ["normals"]]}  # fmt: skip
    make(tmp_path, "progressive", {"semseg": 1.0, "normals": 2.0}, preparation=found)
    (figure,) = drawn("similarity", tmp_path)
    assert [t.get_text() for t in figure.axes[0].texts] == ["1.00", "0.00", "0.00", "1.00"]
    assert "SemSeg | Normals" in figure.axes[0].get_title()


def test_curves_are_means_over_seeds(tmp_path):
    for seed, value in ((0, 1.0), (1, 3.0)):
        history = [{"step": step, "loss": value, "lr": 1.0, "loss/semseg": 2 * value} for step in (1, 2)]
        make(tmp_path, "ours", {"semseg": 50.0}, seed=seed, history=history)
    (figure,) = drawn("curves", tmp_path)
    lines = [axis.lines[0].get_ydata().tolist() for axis in figure.axes if axis.get_visible()]
    assert lines == [[2.0, 2.0], [4.0, 4.0]]


@pytest.mark.parametrize("name", ["memory", "sweep", "ablation", "gradients", "similarity", "curves"])
def test_a_figure_without_its_figures_says_what_makes_them(tmp_path, name):
    make(tmp_path, "ours", FOUR)
    make(tmp_path, "single_task_full", FOUR)
    with pytest.raises(BenchError):
        drawn(name, tmp_path)


def test_files_are_written_and_the_same_every_time(tmp_path):
    make(tmp_path, "single_task_full", FOUR)
    make(tmp_path, "ours", FOUR)
    seen = []
    for turn in ("a", "b"):
        done = CliRunner().invoke(
            app, ["figure", "pareto", str(tmp_path), "--out", str(tmp_path / turn), "--published"]
        )
        assert done.exit_code == 0, done.output
        files = sorted((tmp_path / turn).iterdir())
        assert [file.suffix for file in files] == [".png", ".svg"]
        seen.append((np.asarray(Image.open(files[0])), files[1].read_text()))
    assert np.array_equal(seen[0][0], seen[1][0]) and seen[0][1] == seen[1][1]
    assert seen[0][0].min() < 255 and "Ours" in seen[0][1]  # text stays text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["parteo"], "did you mean 'pareto'"), (["gates"], "name its record with --record"),
     (["pareto", "nowhere"], "no folder nowhere")],
)  # fmt: skip
def test_what_is_refused(arguments, message):
    done = CliRunner().invoke(app, ["figure", *arguments])
    assert done.exit_code == 2 and message in " ".join(done.output.split())


def test_published_points_are_marked(tmp_path):
    for method in ("single_task_full", "mtlora"):
        make(tmp_path, method, FOUR, device="nvidia-h200")
    (plain,), (figure,) = drawn("pareto", tmp_path), drawn("pareto", tmp_path, published=True)
    labels = figure.axes[1].get_legend_handles_labels()[1]
    assert "MTLoRA †" in labels and "†" in figure.get_suptitle() and "†" not in plain.get_suptitle()
    point = next(line for line in figure.axes[1].lines if line.get_label() == "MTLoRA †")
    assert float(point.get_xdata()[0]) == 18.22 and float(point.get_ydata()[0]) == 2.55
    with pytest.raises(BenchError, match="goes without --reference"):
        drawn("pareto", tmp_path, published=True, reference="mtlora")
    assert from_records.tables is tables


def test_a_paper_s_memory_is_not_drawn_on_a_cpu_s_axis(tmp_path):
    """Parameters are the same anywhere; GB and seconds of another GPU are not."""
    for method in ("single_task_full", "mtlora"):
        make(tmp_path, method, FOUR)
    (figure,) = drawn("pareto", tmp_path, published=True)
    shown = [any(line.get_label() == "MTLoRA †" for line in axis.lines) for axis in figure.axes]
    assert shown == [True, False, False]


def test_published_points_where_no_paper_has_the_backbone(tmp_path):
    for method in ("single_task_full", "mtlora"):
        make(tmp_path, method, FOUR, backbone="vit_small_patch14_dinov2.lvd142m")
    with pytest.raises(BenchError, match="no paper prints a row"):
        drawn("pareto", tmp_path, published=True)


def test_what_cannot_be_drawn_is_said(tmp_path):
    make(tmp_path, "single_task_full", FOUR)
    make(tmp_path, "mtlora", FOUR)
    make(tmp_path, "ours", FOUR, status="diverged", metrics={})
    (figure,) = drawn("pareto", tmp_path)
    assert "not drawn: Ours (diverged)" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("pareto", "--record", "ab"), "--record says nothing to pareto"),
        (("curves", "--published"), "--published says nothing to curves"),
        (("curves", "--images", "3"), "--images says nothing to curves"),
        (("memory", "--option", "r"), "--option says nothing to memory"),
        (("pareto", "--out", "x.png"), "give a folder"),
        (("pareto", "--reference", "nosuch"), "no record of 'nosuch'"),
    ],
)
def test_options_that_a_figure_does_not_have_are_refused(args, complaint, tmp_path):
    make(tmp_path, "ours", FOUR)
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["figure", args[0], str(tmp_path), *args[1:]])
    assert done.exit_code == 2 and complaint in done.output


def test_an_unreadable_record_is_named(tmp_path):
    make(tmp_path, "ours", FOUR)
    (tmp_path / "half.json").write_text("{")
    out = str(tmp_path / "f")
    args = ["figure", "sweep", str(tmp_path), "--out", out]
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, args)
    assert "left out:" in done.output and "half.json" in done.output


def test_a_setting_with_one_method_is_drawn_only_where_there_is_no_other(tmp_path):
    make(tmp_path, "single_task_full", FOUR, batch_size=4)
    assert len(drawn("pareto", tmp_path)) == 1
    for method in ("single_task_full", "mtlora"):
        make(tmp_path, method, FOUR)
    (figure,) = drawn("pareto", tmp_path)
    assert "MTLoRA" in figure.axes[0].get_legend_handles_labels()[1]


LONG = "TADFormer [scale=1, dropout=0, drop_path=0, rank=64, general_rank=64, width=16, tokens=4]"


@pytest.mark.parametrize(("letters", "columns"), [(20, 3), (45, 2), (80, 1)])
def test_a_legend_is_no_wider_than_its_figure(letters, columns):
    figure, (axis,) = panels(1, 7.0, 2.0)
    for index in range(6):
        axis.plot([0, 1], [0, index], label=f"{index} {LONG}"[:letters])
    legend_below(figure, axis)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend._ncols == columns
    assert legend.get_window_extent().width <= figure.get_figwidth() * figure.dpi
