"""What only a CUDA GPU can show; and, on any machine, how a cell is given its GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import device, grid, processes, run, sweep
from bench.errors import BenchError
from bench.spec import Job

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
BASE = {"methods": "ours", "weights": "random", "image_size": "64", "recipe": "smoke", "steps": 0}


def job_on(index: int, monkeypatch: pytest.MonkeyPatch) -> Job:
    gpus = [{"name": f"NVIDIA Test {i}", "major": 9} for i in range(4)]
    monkeypatch.setattr(device, "_cuda_devices", lambda: gpus)
    (job,) = grid.jobs(None, BASE, None, f"cuda:{index}", None, Path("runs"))
    return job


def test_a_record_is_of_the_gpu_that_was_asked_for(monkeypatch):
    job = job_on(2, monkeypatch)
    assert job.spec.device == "nvidia-test-2" and job.device_name == "NVIDIA Test 2"
    assert sweep.blank_record(job).provenance.device_name == "NVIDIA Test 2"


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [(None, 2, "2"), ("5,7", 1, "7"), ("GPU-aa,GPU-bb", 1, "GPU-bb"), (" 3 , 1", 0, "3")],
)
def test_a_cell_sees_its_gpu_alone(visible, index, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert processes.environment(cuda=True, index=index)["CUDA_VISIBLE_DEVICES"] == expected
    assert job_on(index, monkeypatch).device_index == index


def test_precisions_that_a_gpu_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(device, "_cuda_devices", lambda: [{"name": "Old", "major": 7}])
    with pytest.raises(BenchError, match="Old has no bf16"):
        device.resolve_device("cuda", "bf16")
    assert device.resolve_device("cuda", "fp16").slug == "old"


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_cell_measures_and_trains(precision, tmp_path):
    from rich.console import Console

    settings = BASE | {"methods": "ours,mtlora", "steps": 3, "precision": precision}
    for record in sweep.run_all(grid.jobs(None, settings, None, "cuda", 0, tmp_path, estimate=False), Console()):
        assert record.status == "ok", record.failure
        assert 0 < record.memory.weights_allocated < record.memory.peak_allocated <= record.memory.peak_reserved
        assert record.time.device == "cuda" and min(record.time.samples) > 0
        assert (record.time.queued is None) == (precision == "fp16")


def test_figures_of_a_cpu_never_go_under_a_gpus_name(monkeypatch, tmp_path):
    job = job_on(0, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bench.measure.cuda.Accelerator", lambda **_: SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(RuntimeError, match="accelerate chose cpu where cuda was asked for"):
        run.run_cell(job, run.blank_record(job), lambda event, **values: None)


@needs_gpu
def test_cells_are_forked_from_a_server_that_has_touched_no_gpu(tmp_path):
    """Else each would be started anew, with all its imports."""
    from multiprocessing import forkserver

    from rich.console import Console

    (record,) = sweep.run_all(grid.jobs(None, BASE, None, "cuda", 0, tmp_path, estimate=False), Console())
    assert record.status == "ok" and record.time.device == "cuda"
    opened = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/fd")
    assert not [entry for entry in opened.iterdir() if str(entry.readlink()).startswith("/dev/nvidia")]
