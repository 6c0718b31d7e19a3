"""Cells in processes of their own: found again, failed alone, killed, interrupted and resumed."""

from __future__ import annotations

import fcntl
import io
import json
import multiprocessing.forkserver
import os
import re
import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import save_file
from typer.testing import CliRunner

from bench import grid, processes, resources, run, sweep
from bench import record as records
from bench.cli import app
from bench.errors import BenchError
from bench.failure import KILLED
from bench.measure import code, provenance
from bench.record import Estimated, Failure
from bench.tuning import trial
from methods.registry import MethodError
from tests.report import records as make

STEPS = 60
RECIPE = {
    "title": "A few steps",
    "optimizer": {"name": "adamw", "lr": 0.001},
    "schedule": {"name": "cosine"},
    "batch_size": 2,
    "steps": STEPS,
    "loss_weights": {"semseg": 1, "depth": 1},
    "augment": {"hflip": 0.5, "rotate": 20, "scale": [0.75, 1.25]},
    "measure": {"warmup": 0, "steps": 1},
    "limit_train": 6,
    "limit_val": 2,
}
LITE = "tf_efficientnet_lite0.in1k"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Cells that share two cores with other tests are far quicker on one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def asked(folder: Path, **changes) -> tuple[str, ...]:
    """The options of a small run, with a recipe of its own under `folder`."""
    path = folder / "few.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return (
        "run", "--methods", "decoder_only", "--backbone", LITE, "--weights", "random", "--image-size", "32",
        "--device", "cpu", "--recipe", str(path), "--tasks", "semseg,depth",
    )  # fmt: skip


def bench(*args: str | Path):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(arg) for arg in args])


def found(out: Path) -> list[records.Record]:
    return [item.record for item in records.scan(out)]


def found_readable(out: Path) -> list[records.Record]:
    return [item.record for item in records.scan(out) if isinstance(item, records.Found)]


def only(out: Path) -> records.Record:
    (record,) = found(out)
    return record


def at_step(monkeypatch, number, act):
    """Call `act`, or send the first cell's process that signal, where the cell reports training step `number`.

    Returns every event seen."""
    started, seen, start, show = [], [], processes.start, sweep._show

    def watched_start(*args):
        started.append(start(*args))
        return started[-1]

    def watch(event, progress, line):
        seen.append(event)
        show(event, progress, line)
        if "loss" in event and event["step"] == number:
            act() if callable(act) else len(started) > 1 or os.kill(started[0][0].pid, act)

    monkeypatch.setattr(processes, "start", watched_start)
    monkeypatch.setattr(sweep, "_show", watch)
    return seen


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two cells, the first of which is killed while it trains; the same command again; and, after the record of the
    second has lost its end, with --retry."""
    folder = tmp_path_factory.mktemp("killed")
    args = (*asked(folder), "--seeds", "0,1", "--out", folder / "runs")
    results = {"out": folder / "runs"}
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, signal.SIGKILL)
        results["killed"] = bench(*args)
    results["records"] = found(folder / "runs")

    paths = [item.path for item in records.scan(folder / "runs")]
    stamps, started = [path.stat().st_mtime_ns for path in paths], time.monotonic()
    results["again"] = bench(*args)
    results["seconds of again"] = time.monotonic() - started
    results["touched"] = [path.stat().st_mtime_ns for path in paths] != stamps

    paths[1].write_text(paths[1].read_text()[:700])
    results["report"] = bench("report", folder / "runs", "--save", folder / "report")
    results["retried"] = bench(*args, "--retry")
    results["after"] = found(folder / "runs")
    return results


def test_a_killed_cell_is_a_failed_record(killed):
    record = killed["records"][0]
    assert killed["killed"].exit_code == 1 and "killed by SIGKILL" in killed["killed"].stdout
    assert killed["killed"].stderr == ""
    assert record.status == "failed" and record.failure.kind == "signal"
    assert record.failure.message.startswith("killed by SIGKILL") and "memory" in record.failure.message
    assert not record.metrics


def test_the_cell_after_a_failed_one_still_runs(killed):
    assert "1 of 2 cells ok" in killed["killed"].stdout
    assert [record.spec.seed for record in killed["records"]] == [0, 1]
    assert killed["records"][1].status == "ok" and killed["records"][1].metrics


def test_the_same_command_runs_nothing_twice(killed):
    assert killed["again"].exit_code == 1 and "1 of 2 cells ok" in killed["again"].stdout
    assert "done " not in killed["again"].stdout and "other code" not in killed["again"].stdout
    assert not killed["touched"] and killed["seconds of again"] < 5


def test_a_report_skips_half_a_record_with_a_line(killed):
    report = killed["report"]
    said = " ".join(report.stdout.split())
    assert report.exit_code == 0
    assert "1 unreadable file left out" in said and "-s1.json is no JSON, or half of it" in said


def test_retry_runs_what_failed_and_half_a_record_is_run_again(killed):
    said = killed["retried"].stdout
    assert killed["retried"].exit_code == 0 and said.count("done ") == 2
    assert all(f"{record.spec.hash}-s{record.spec.seed}" in said for record in killed["after"])  # for `bench show`
    assert [record.status for record in killed["after"]] == ["ok", "ok"]


def test_records_lie_at_the_documented_path_and_nothing_else_is_left(killed):
    folder = killed["out"] / "cpu" / "scenes" / LITE / "decoder_only"
    cell = killed["after"][0].spec.hash
    files = sorted(path for path in killed["out"].rglob("*") if path.is_file())
    assert files == sorted(
        folder / f"{cell}-s{seed}.{end}" for seed in (0, 1) for end in ("json", "trained.safetensors")
    )


def test_a_record_is_complete(killed):
    for record in killed["after"]:
        assert record.failure is None
        assert set(record.metrics) == {"semseg", "depth"} and record.metrics["depth"]["rmse"] > 0
        assert [entry["step"] for entry in record.history] == list(range(1, STEPS + 1))
        assert record.parameters.trainable == record.parameters.decoder > 0
        assert len(record.time.samples) == 1 and record.memory.process_peak > 2**26
        assert (
            record.provenance.weights.source == "random"
            and record.provenance.data_fingerprint == record.spec.data_fingerprint
        )


def test_an_estimate_that_was_left_out_is_filled_in_later(killed, tmp_path):
    """Equal to the one that the cell made itself; what has one and what is no record stay as they are."""
    whole = killed["after"]
    assert whole[0].estimate.peak > 0
    whole[0].model_copy(update={"estimate": None}).write(tmp_path)
    kept = whole[1].write(tmp_path)
    (tmp_path / "half.json").write_text("{")
    stamp = kept.stat().st_mtime_ns
    done = bench("estimate", "--records", tmp_path)
    assert done.exit_code == 0 and "1 record filled in" in done.stdout and "half.json" in done.stderr
    filled = found_readable(tmp_path)
    assert filled[0].estimate.commit == provenance.git_state()[0]
    filled[0].estimate.commit = None
    assert filled == whole and kept.stat().st_mtime_ns == stamp
    assert "0 records filled in" in bench("estimate", "--records", tmp_path).stdout


def test_estimates_are_filled_in_where_they_can_be(killed, tmp_path):
    """Of a card of one's own where it is named; and what cannot be estimated stays without, for another time."""
    made = killed["after"][0].model_copy(update={"estimate": None})

    def variant(**changes):
        return made.model_copy(update={"spec": made.spec.model_copy(update=changes)}).write(tmp_path / "runs")

    street, gone, plain = variant(dataset="street"), variant(method="gone_method"), variant(seed=7)
    card = tmp_path / "street.yaml"
    card.write_text((resources.folder("datasets") / "scenes.yaml").read_text().replace("name: scenes", "name: street"))
    first = bench("estimate", "--records", tmp_path / "runs")
    assert "1 record filled in" in first.stdout and "--dataset" in first.stderr and "gone_method" in first.stderr
    second = bench("estimate", "--records", tmp_path / "runs", "--dataset", card)
    assert "1 record filled in" in second.stdout
    assert [records.read(path).estimate is None for path in (street, gone, plain)] == [False, True, False]
    assert records.read(plain).estimate.commit == provenance.git_state()[0]


@pytest.mark.parametrize("more", [("--methods", "ours"), ("--gpu", "24GB"), ("--markdown",), ("--image-size", "448")])
def test_what_the_records_say_themselves_is_not_asked_for(killed, more):
    done = bench("estimate", "--records", killed["out"], *more)
    assert done.exit_code == 2 and f"leave {more[0]} out" in done.stderr


def test_the_same_seed_gives_the_same_figures(killed):
    first, again = killed["records"][1], killed["after"][1]
    assert (again.metrics, again.per_class, again.history) == (first.metrics, first.per_class, first.history)


def test_another_seed_gives_other_figures(killed):
    one, other = killed["after"]
    assert one.spec.hash == other.spec.hash
    assert one.metrics != other.metrics and one.history[0]["loss"] != other.history[0]["loss"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that gets an interrupt at its twelfth step, and the same command once more."""
    folder = tmp_path_factory.mktemp("resumed")
    args = (*asked(folder), "--out", folder / "runs")
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        # To this process, as Ctrl-C would: the cell sits in a session of its own. A test run in the background was
        # started with the signal ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        at_step(patch, 12, lambda: signal.raise_signal(signal.SIGINT))
        results["interrupted"] = bench(*args)
        signal.signal(signal.SIGINT, before)
    results["files"] = {path.suffix for path in folder.rglob("runs/**/*") if path.is_file()}
    results["record"] = only(folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        results["events"] = at_step(patch, None, None)
        results["resumed"] = bench(*args)
    results["files after"] = {path.name.partition(".")[2] for path in folder.rglob("runs/**/*") if path.is_file()}
    results["record after"] = only(folder / "runs")
    return results


def test_an_interrupt_leaves_a_record_and_a_checkpoint(resumed):
    assert resumed["interrupted"].exit_code == 130
    assert "interrupted" in resumed["interrupted"].stderr and "same command" in resumed["interrupted"].stderr
    assert resumed["record"].status == "interrupted" and not resumed["record"].metrics
    assert {".json", ".safetensors"} <= resumed["files"]
    assert ".tmp" not in resumed["files"]


def test_the_same_command_goes_on_where_it_stopped(resumed):
    assert resumed["resumed"].exit_code == 0
    steps = [event["step"] for event in resumed["events"] if "loss" in event]
    assert 12 < steps[0] <= STEPS and steps == list(range(steps[0], STEPS + 1))
    assert re.search(rf"from step {steps[0] - 1}\b", resumed["resumed"].stdout)
    assert [entry["step"] for entry in resumed["record after"].history] == list(range(1, STEPS + 1))


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(resumed, killed):
    after, alone = resumed["record after"], killed["after"][0]
    assert after.spec == alone.spec
    assert after.history[-1] == alone.history[-1]
    assert (after.history, after.metrics, after.per_class) == (alone.history, alone.metrics, alone.per_class)


def test_nothing_but_the_record_and_what_was_trained_is_left_in_the_end(resumed):
    assert resumed["record after"].status == "ok" and resumed["record after"].trained_sha256
    assert resumed["files after"] == {"json", "trained.safetensors"}


@pytest.mark.parametrize(
    ("status", "trained_by", "goes_on"),
    [
        ("interrupted", ["this"], True),
        ("interrupted", ["that"], False),
        ("interrupted", ["that", "this"], False),  # went on from other code's, and was interrupted again
        ("interrupted", None, False),  # from before there were fingerprints
        ("failed", ["this"], False),
        (None, ["this"], False),
    ],
)
def test_fresh_goes_on_only_from_a_checkpoint_of_the_same_code(
    resumed, tmp_path, monkeypatch, status, trained_by, goes_on
):
    made = resumed["record"]
    job = SimpleNamespace(
        record_path=tmp_path / made.spec.relative_path(), checkpoint_path=tmp_path / "cell.safetensors"
    )
    about = {"step": 3} | ({"codes": trained_by} if trained_by else {})
    save_file({"any": np.zeros(1)}, job.checkpoint_path, {"bench": json.dumps(about)})
    if status:
        provenance = made.provenance.model_copy(update={"code": "this"})  # it may not have come to training
        made.model_copy(update={"status": status, "provenance": provenance}).write(tmp_path)
    monkeypatch.setattr(sweep.code, "fingerprint", lambda expression: "this")
    sweep.forget_other_code(job)
    assert job.checkpoint_path.exists() == goes_on


@pytest.mark.parametrize("said", ["null", "[]", "5", "no json"])
def test_a_checkpoint_that_says_nothing_of_itself_stops_no_sweep(tmp_path, said):
    save_file({"any": np.zeros(1)}, tmp_path / "cell.safetensors", {"bench": said})
    assert sweep._checkpoint(SimpleNamespace(checkpoint_path=tmp_path / "cell.safetensors")) == {}


def test_fresh_starts_anew_after_a_change(tmp_path, monkeypatch):
    args = (*asked(tmp_path), "--out", tmp_path / "runs")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 12, signal.SIGTERM)
        bench(*args)
    (checkpoint,) = (tmp_path / "runs").rglob("*.safetensors")
    assert only(tmp_path / "runs").status == "interrupted"
    own = code.fingerprint("decoder_only")
    assert only(tmp_path / "runs").provenance.code == own
    monkeypatch.setattr(sweep.code, "fingerprint", lambda expression: "another")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 30, signal.SIGTERM)
        again = bench(*args)
    assert re.search(r"resuming .* from step \d+, trained by other code .*: --fresh starts anew", again.output)
    again = bench(*args, "--fresh")
    assert again.exit_code == 0 and "resuming" not in again.output
    assert only(tmp_path / "runs").status == "ok"
    assert "measured by other code" in bench(*args).output
    assert "by other code" in " ".join(bench(*args, "--dry-run").output.split())
    monkeypatch.setattr(sweep.code, "fingerprint", lambda expression: own)
    assert "kept" in (again := bench(*args).output) and "other code" not in again
    assert "other code" not in bench(*args, "--dry-run").output
    failed = only(tmp_path / "runs").model_copy(
        update={"status": "failed", "failure": records.Failure(kind="Error", message="a typo")}
    )
    failed.write(tmp_path / "runs")
    assert "a typo (--retry runs it again)" in " ".join(bench(*args).output.split())
    monkeypatch.setattr(sweep.code, "fingerprint", lambda expression: "another")
    told = " ".join(bench(*args).output.split())
    assert re.search(r"a typo \(by other code.*; --retry runs it again\)", told)


def test_a_second_interrupt_kills_the_cell_at_once(monkeypatch):
    calls = []

    class Stubborn:
        pid, exitcode = -1, None

        def join(self, timeout=None):
            calls.append("join")

        def kill(self):
            calls.append("kill")

    class Silent:
        def poll(self, timeout):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "kill", lambda pid, number: calls.append((pid, number)))
    assert sweep._stop(Stubborn(), Silent(), set()) is True
    assert calls == [(-1, signal.SIGINT), "kill", "join"]


@pytest.mark.parametrize("by_us", [True, False])
def test_a_cell_that_the_sweep_killed_did_not_lack_memory(shared_out, by_us):
    message = sweep._crashed(shared_out.jobs()[0], -signal.SIGKILL, "interrupted", by_us).failure.message
    assert message == ("did not stop in time and was killed" if by_us else f"killed by SIGKILL; {KILLED}")


def test_an_interrupt_between_a_cells_record_and_its_end_loses_nothing(tmp_path, monkeypatch):
    def show(event, progress, line):
        if event["event"] == "ended":
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_show", show)
    assert bench(*asked(tmp_path, steps=2), "--out", tmp_path / "runs").exit_code == 130
    assert only(tmp_path / "runs").status == "ok"


@pytest.mark.skipif(processes.METHOD != "forkserver", reason="there is a server on Linux alone")
def test_a_cells_record_stands_whatever_becomes_of_the_server(tmp_path):
    """The server knows the exit code, and is killed."""
    server = multiprocessing.forkserver._forkserver
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(server._forkserver_pid, signal.SIGKILL))
        assert bench(*asked(tmp_path, steps=6), "--out", tmp_path / "runs").exit_code == 0
    record = only(tmp_path / "runs")
    assert record.status == "ok" and record.history[-1]["step"] == 6


def test_a_loss_that_explodes_is_recorded_as_diverged(tmp_path):
    result = bench(*asked(tmp_path, optimizer={"name": "sgd", "lr": 1e20}, steps=6), "--out", tmp_path / "runs")
    assert result.exit_code == 1
    record = only(tmp_path / "runs")
    assert record.status == "diverged"
    assert "not finite at step" in record.failure.message
    assert not record.metrics
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def kept_failure(tmp_path, method, message):
    """What a sweep prints of a cell whose failed record is there already."""
    given = {"methods": method, "recipe": "smoke", "image_size": 32, "weights": "random"}
    (job,) = grid.jobs(None, given, None, "cpu", 0, tmp_path)
    record = run.blank_record(job)
    record.status, record.failure = "failed", Failure(kind="RuntimeError", message=message)
    record.write(tmp_path)
    printed = io.StringIO()
    sweep.run_all([job], Console(file=printed, width=300))
    return printed.getvalue()


def test_a_cells_options_are_printed(tmp_path):
    assert "bdta_mote[r=2]" in kept_failure(tmp_path, "ours[r=2]", "for a reason")


@pytest.mark.parametrize("message", ["[enforce fail at alloc.cpp:1] can't allocate", "cannot read /data/[/x].png"])
def test_a_failures_message_is_printed_as_it_is(tmp_path, message):
    assert message in kept_failure(tmp_path, "decoder_only", message)


def test_an_error_of_several_lines_keeps_its_first():
    error = BenchError("cannot resume: size mismatch for a\n\tsize mismatch for b")
    assert run.classify(error)[1].message == "cannot resume: size mismatch for a size mismatch for b"


def test_an_empty_failure_is_classified():
    for error in (RuntimeError(), KeyboardInterrupt(), MemoryError(), BenchError(), MethodError("")):
        status, failure = run.classify(error)
        assert status in ("failed", "interrupted", "out_of_memory")
        assert failure.message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_running_out_of_memory_is_a_status_of_its_own(error):
    assert run.classify(error)[0] == "out_of_memory"


def test_a_killed_process_of_a_pool_is_told_in_words():
    status, failure = run.classify(BrokenProcessPool("A child process terminated abruptly"))
    assert status == "failed" and failure.message.startswith("a process that scores edges was killed; the system")


def test_a_cell_without_an_estimate(tmp_path):
    given = {"methods": "decoder_only", "backbone": LITE, "weights": "random", "image_size": "32", "recipe": "smoke"}
    (job,) = grid.jobs(None, given | {"steps": 0}, None, "cpu", None, tmp_path, estimate=False)
    (record,) = sweep.run_all([job], Console())
    assert record.status == "ok" and record.estimate is None and record.time and record.memory


@pytest.mark.parametrize("fails", [False, True])
def test_the_estimate_is_no_part_of_what_is_measured(tmp_path, monkeypatch, fails):
    """It comes after, since it would be in the resident peak; and a cell that ran out of memory has it too."""
    given = {"methods": "decoder_only", "backbone": LITE, "weights": "random", "image_size": "32", "recipe": "smoke"}
    (job,) = grid.jobs(None, given | {"steps": 0}, None, "cpu", None, tmp_path)
    record, order = run.blank_record(job), []

    def measure(cell, record, emit):
        order.append("measured")
        if fails:
            raise MemoryError("no room")

    monkeypatch.setattr(run, "_measure_efficiency", measure)
    monkeypatch.setattr(run, "estimated", lambda spec, channels: order.append("estimated") or Estimated(peak=1))
    with pytest.raises(MemoryError, match="no room") if fails else nullcontext():
        run.run_cell(job, record, lambda event, **values: None)
    assert order == ["measured", "estimated"] and record.estimate.peak == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cell_in_either_precision_of_a_cpu(precision, tmp_path):
    """With its estimate, in the process of its own that a cell is."""
    given = {"methods": "decoder_only", "weights": "random", "image_size": "32", "recipe": "smoke", "steps": 0}
    (job,) = grid.jobs(None, given | {"precision": precision}, None, "cpu", None, tmp_path)
    (record,) = sweep.run_all([job], Console())
    assert record.status == "ok", record.failure
    assert record.estimate.peak > record.estimate.weights > 0 and record.estimate.forward > 0
    assert set(record.time.phases) == {"forward", "loss", "backward", "optimizer"} and record.time.floor
    assert record.parameters.passes == 1


@pytest.fixture
def shared_out(tmp_path, monkeypatch):
    """Jobs of four seeds, a hold on what another sweep would lock, and cells that fail at once, in the order in which
    they were begun."""
    begun, ends = [], {}

    def jobs(**recipe):
        path = tmp_path / "few.yaml"
        path.write_text(yaml.safe_dump(RECIPE | recipe))
        given = {
            "methods": "decoder_only",
            "backbone": LITE,
            "weights": "random",
            "image_size": "32",
            "seeds": "0,1,2,3",
        }
        given |= {"tasks": "semseg,depth"}
        return grid.jobs(None, given | {"recipe": str(path)}, None, "cpu", 0, tmp_path / "runs", print)

    def hold(job):
        path = job.record_path.with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
        fcntl.flock(file, fcntl.LOCK_EX)

        def release():
            path.unlink(missing_ok=True)
            file.close()

        late = threading.Timer(20, release)  # a sweep that waits for what it need not fails, and does not hang
        late.daemon = True
        late.start()
        return release

    def fail(job, progress, line):
        begun.append((job.spec.seed, job.spec.trial is not None))
        ends.get(job.spec.seed, lambda: None)()
        record = run.blank_record(job)
        record.status, record.failure = "failed", Failure(kind="Test", message="on purpose")
        record.write(job.out)
        return record

    monkeypatch.setattr(sweep, "_run_one", fail)
    shown = Console(file=io.StringIO(), width=200)
    return SimpleNamespace(jobs=jobs, hold=hold, begun=begun, ends=ends, shown=shown)


def test_two_sweeps_are_never_at_the_same_cell(tmp_path):
    """Each one lets go by taking the lock's file away, while others hold, open or make it."""
    job = SimpleNamespace(record_path=tmp_path / "cell.json")
    waits = SimpleNamespace(wait=True, console=Console(file=io.StringIO()))
    inside, together, turns = [], [], []

    def take_turns():
        for _ in range(150):
            with sweep.only_here(job, "cell", waits):
                inside.append(1)
                time.sleep(1e-4)
                together.append(len(inside))
                inside.pop()
            turns.append(1)

    others = [threading.Thread(target=take_turns) for _ in range(4)]  # their locks are apart, as those of processes are
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert set(together) == {1} and len(turns) == 4 * 150
    assert not list(tmp_path.iterdir())


def test_what_another_sweep_is_at_comes_last(shared_out):
    jobs = shared_out.jobs()
    shared_out.ends[1] = shared_out.hold(jobs[0])  # let go when seed 1 has begun
    results = sweep.run_all(jobs, shared_out.shown)
    assert [seed for seed, _ in shared_out.begun] == [1, 2, 3, 0]
    assert [result.spec.seed for result in results] == [0, 1, 2, 3]
    assert "waiting" not in shared_out.shown.file.getvalue()


def test_nothing_is_waited_for_while_something_else_is_left(shared_out):
    jobs = shared_out.jobs()
    shared_out.ends[2], shared_out.ends[3] = shared_out.hold(jobs[0]), shared_out.hold(jobs[2])
    sweep.run_all(jobs, shared_out.shown)
    assert [seed for seed, _ in shared_out.begun] == [1, 3, 2, 0]


def test_what_another_sweep_has_done_meanwhile_is_kept(shared_out):
    jobs = shared_out.jobs()
    release = shared_out.hold(jobs[0])

    def elsewhere():
        record = run.blank_record(jobs[0])
        record.status, record.failure = "failed", Failure(kind="Test", message="elsewhere")
        record.write(jobs[0].out)
        release()

    shared_out.ends[2] = elsewhere
    results = sweep.run_all(jobs, shared_out.shown)
    assert [seed for seed, _ in shared_out.begun] == [1, 2, 3]
    assert results[0].failure.message == "elsewhere" and "kept: failed" in shared_out.shown.file.getvalue()


@pytest.mark.parametrize("flag", ["retry", "fresh"])
def test_what_another_sweep_has_run_since_this_one_began_is_not_run_again(shared_out, flag):
    jobs = shared_out.jobs()[:2]
    for job in jobs:  # records from before: these flags are about them
        record = run.blank_record(job)
        record.status = "failed"
        os.utime(record.write(job.out), (1, 1))
    release = shared_out.hold(jobs[0])

    def elsewhere():
        run.blank_record(jobs[0]).model_copy(update={"status": "failed"}).write(jobs[0].out)
        release()

    shared_out.ends[1] = elsewhere
    sweep.run_all(jobs, shared_out.shown, **{flag: True})
    assert [seed for seed, _ in shared_out.begun] == [1]


def test_where_all_that_is_left_is_elsewhere_it_waits(shared_out):
    jobs = shared_out.jobs()[:2]
    for job in jobs:
        threading.Timer(0.5, shared_out.hold(job)).start()
    results = sweep.run_all(jobs, shared_out.shown)
    assert sorted(seed for seed, _ in shared_out.begun) == [0, 1] and len(results) == 2
    assert shared_out.shown.file.getvalue().count("waiting") >= 1


def test_a_cell_whose_trial_is_elsewhere_comes_last(shared_out):
    tuned = {"optimizer": {"name": "adamw"}, "tune": {"rates": [1e-5, 1e-2]}}
    first, other = shared_out.jobs(**tuned)[0], shared_out.jobs()[1]
    shared_out.ends[1] = shared_out.hold(trial(first, 1e-2))
    sweep.run_all([first, other], shared_out.shown)
    # The trial that was free, the other cell, the trial that was not; a cell whose trials fail is run to say so.
    assert shared_out.begun == [(0, True), (1, False), (0, True), (0, False)]


def test_what_other_code_has_trained_in_part_is_other_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.code, "fingerprint", lambda expression: "this")
    made = records.read(make.make(tmp_path, "ours"))
    for code_of, earlier, other in (("this", [], ""), ("this", ["before"], "other code"), ("before", [], "other code")):
        seen = made.provenance.model_copy(update={"code": code_of, "earlier_code": earlier})
        assert sweep.other_code(made.model_copy(update={"provenance": seen})) == other


def test_cells_on_other_data_are_told_with_the_data_before_and_now(tmp_path):
    """Of the same seed alone; half a record beside them says nothing."""
    path = make.make(tmp_path, "ours", data_fingerprint="0123456789")
    (path.parent / "half-s0.json").write_text("{")

    def job(**changes):
        spec = records.read(path).spec.model_copy(update={"data_fingerprint": "abcdef0123"} | changes)
        return SimpleNamespace(spec=spec, record_path=tmp_path / spec.relative_path(), data_contents={})

    told = sweep.on_other_data([job(), job(seed=1)])
    assert told.startswith("1 of these cells is here on other data (01234567, now abcdef01:")
    assert sweep.on_other_data([job(batch_size=9)]) == sweep.on_other_data([job(data_fingerprint="0123456789")]) == ""


def test_weights_of_an_earlier_run_do_not_outlive_it(tmp_path):
    args = (*asked(tmp_path, steps=2), "--out", tmp_path / "runs")
    for more, kept in (((), 1), (("--fresh", "--no-keep-weights"), 0)):
        assert bench(*args, *more).exit_code == 0
        assert len(list((tmp_path / "runs").rglob("*.trained.safetensors"))) == kept
