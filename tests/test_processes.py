"""Measuring processes: what they are given, that they are fresh, and what ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench import processes
from bench.resources import ROOT

LINUX = pytest.mark.skipif(processes.METHOD != "forkserver", reason="processes are forked on Linux alone")


def tell(argument, told):
    """What a process sees of itself, to whoever started it."""
    print("heard", argument, flush=True)
    os.system("echo from another program")
    import torch

    seen = {"argument": argument, "session": os.getsid(0) == os.getpid(), "variable": os.environ.get("GIVEN")}
    seen |= {"draw": torch.rand(1).item(), "parent": os.getppid(), "pid": os.getpid(), "seed": torch.initial_seed()}
    torch.manual_seed(7)
    told.send(seen)


def die(argument, told):
    os.kill(os.getpid(), signal.SIGKILL)


def wait(argument, told):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    told.send(os.getpid())
    signal.pause()


def run(target, tmp_path, argument=3, **variables):
    process, heard = processes.start(target, argument, tmp_path / "log", os.environ | variables)
    seen = heard.recv()
    process.join()
    return process, seen


def test_it_is_given_its_argument_its_environment_and_a_session(tmp_path, monkeypatch):
    monkeypatch.setenv("TAKEN", "1")
    process, seen = run(tell, tmp_path, {"n": 4}, GIVEN="yes")
    assert process.exitcode == 0 and seen["argument"] == {"n": 4} and seen["session"] and seen["variable"] == "yes"
    assert (tmp_path / "log").read_text() == "heard {'n': 4}\nfrom another program\n"
    assert "GIVEN" not in os.environ and os.environ["TAKEN"] == "1"
    _, seen = run(tell, tmp_path)
    assert seen["variable"] is None  # not what the one before was given


def test_nothing_is_left_of_the_one_before(tmp_path):
    (_, first), (_, second) = run(tell, tmp_path), run(tell, tmp_path)
    assert first["pid"] != second["pid"] and (first["seed"], first["draw"]) == (second["seed"], second["draw"])


@LINUX
def test_one_server_forks_them_all(tmp_path):
    (_, first), (_, second) = run(tell, tmp_path), run(tell, tmp_path)
    assert first["parent"] == second["parent"] != os.getpid()


def test_one_that_dies_tells_no_more_and_by_what_it_died(tmp_path):
    process, heard = processes.start(die, None, tmp_path / "log", dict(os.environ))
    with pytest.raises(EOFError):
        heard.recv()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_it_hears_an_interrupt(tmp_path):
    process, heard = processes.start(wait, None, tmp_path / "log", dict(os.environ))
    os.kill(heard.recv(), signal.SIGINT)
    process.join(60)
    assert process.exitcode == 1 and "KeyboardInterrupt" in (tmp_path / "log").read_text()


def python(code, tmp_path):
    """The code in an interpreter of its own, with `tmp_path` and this repository to import from."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)


@LINUX
def test_none_is_forked_from_what_has_touched_a_gpu(tmp_path):
    """A library that asks for one while it is imported, and the processes are no forks any more."""
    (tmp_path / "asks.py").write_text("import torch\ntorch.cuda._is_in_bad_fork = lambda: True\n")
    (tmp_path / "target.py").write_text(
        "import sys\ndef tell(argument, told):\n    told.send((argument, 'asks' in sys.modules))\n"
    )
    code = """
        import os, pathlib, target
        from bench import processes
        processes.PRELOADED = ["asks"]
        process, heard = processes.start(target.tell, "all", pathlib.Path("log"), dict(os.environ))
        print(heard.recv())
    """
    done = python(code, tmp_path)
    assert done.stdout == "('all', False)\n", done.stderr


def test_what_is_imported_beforehand_asks_for_no_gpu(tmp_path):
    code = """
        import importlib, torch
        from bench import processes
        asked = []
        for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "is_bf16_supported"):
            setattr(torch.cuda, name, lambda *a, name=name, **k: asked.append(name))
        for name in processes.PRELOADED:
            importlib.import_module(name)
        print(asked, "torchmetrics" in __import__("sys").modules)
    """
    done = python(code, tmp_path)
    assert done.stdout == "[] False\n", done.stderr


@LINUX
def test_the_server_ends_by_no_signal_to_its_group(tmp_path):
    """As `timeout`, a batch system or a terminal that is closed send them: its processes have to end first."""
    _, first = run(tell, tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(first["parent"], number)
    _, second = run(tell, tmp_path)
    assert second["parent"] == first["parent"]


@LINUX
def test_changed_code_is_read_anew(tmp_path, monkeypatch):
    """Not from a server that still holds the code of before."""
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.setattr(processes, "_served", {})
    (tmp_path / "methods").mkdir()
    file = tmp_path / "methods" / "mine.py"
    file.write_text("")
    assert run(tell, tmp_path)[1]["parent"] != os.getpid()
    os.utime(file, ns=(1, 1))
    assert run(tell, tmp_path)[1]["parent"] == os.getpid()
    file.unlink()
    assert run(tell, tmp_path)[1]["parent"] == os.getpid()


@LINUX
def test_a_preload_that_fails_costs_time_alone(tmp_path):
    (tmp_path / "breaks.py").write_text("raise RuntimeError('another CUDA version')\n")
    (tmp_path / "target.py").write_text("def tell(argument, told):\n    told.send(argument)\n")
    code = """
        import os, pathlib, target
        from bench import processes
        processes.PRELOADED = ["breaks"]
        process, heard = processes.start(target.tell, "all", pathlib.Path("log"), dict(os.environ))
        print(heard.recv())
    """
    done = python(code, tmp_path)
    assert done.stdout == "all\n" and "another CUDA version" in done.stderr


def test_a_pool_is_of_several_processes_that_know_neither_torch_nor_this_one(tmp_path):
    for few in (0, 1):
        with processes.pool(few) as pool:
            assert pool is None
    (tmp_path / "target.py").write_text(
        "import os, sys\ndef f(n):\n    return n, 'torch' in sys.modules, os.getpid()\n"
    )
    code = """
        import os, target, torch
        from bench import processes
        with processes.pool(2) as pool:
            found = list(pool.map(target.f, range(9)))
        print([n for n, _, _ in found], any(known for _, known, _ in found), os.getpid() in {pid for *_, pid in found})
    """
    done = python(code, tmp_path)
    assert done.stdout == f"{list(range(9))} False False\n", done.stderr


def test_an_error_waits_for_what_is_at_work_and_not_for_what_is_queued(tmp_path):
    code = """
        import time
        from bench import processes
        try:
            with processes.pool(2) as pool:
                pool.submit(time.sleep, 0).result()
                asked = [pool.submit(time.sleep, 1) for _ in range(40)]
                began = time.monotonic()
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(sum(future.cancelled() for future in asked) > 30, time.monotonic() - began < 8)
    """
    done = python(code, tmp_path)
    assert done.stdout == "True True\n", done.stderr


@LINUX
def test_a_pool_ends_with_a_process_that_is_killed(tmp_path):
    code = """
        import os, signal
        from bench import processes
        with processes.pool(2) as pool:
            print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = python(code, tmp_path)
    left = {int(pid) for pid in done.stdout.split()}
    assert left and done.returncode == -signal.SIGKILL
    end = time.monotonic() + 30
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left = {pid for pid in left if alive(pid)}
    assert not left


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_cannot_be_read_back_is_told_in_the_log(tmp_path):
    process, heard = processes.start(tell, Unreadable(), tmp_path / "log", dict(os.environ))
    with pytest.raises(EOFError):
        heard.recv()
    process.join()
    assert process.exitcode == 1 and "ValueError: cannot be read back" in (tmp_path / "log").read_text()


class Unreadable:
    def __reduce__(self):
        return fail, ()


def fail():
    raise ValueError("cannot be read back")


def test_an_interrupt_waits_until_it_is_known_what_was_started(monkeypatch):
    before, known, main = signal.signal(signal.SIGINT, signal.default_int_handler), False, sys.modules["__main__"]
    monkeypatch.setenv("GIVEN", "before")
    try:
        with pytest.raises(KeyboardInterrupt), processes._inherited({"GIVEN": "after"}):
            os.kill(os.getpid(), signal.SIGINT)
            known = os.environ["GIVEN"] == "after"
    finally:
        signal.signal(signal.SIGINT, before)
    assert known and os.environ["GIVEN"] == "before" and sys.modules["__main__"] is main


def test_an_interrupt_does_not_end_a_pools_processes(tmp_path):
    """Ctrl-C reaches all of a terminal's: the parent ends them, once it has done what it must."""
    code = """
        import os, signal, time
        from bench import processes
        with processes.pool(2) as pool:
            for pid in {pool.submit(os.getpid).result() for _ in range(20)}:
                os.kill(pid, signal.SIGINT)
            time.sleep(0.5)
            print(pool.submit(abs, -3).result())
    """
    done = python(code, tmp_path)
    assert done.stdout == "3\n", done.stderr


@LINUX
def test_what_reads_images_ends_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "target.py").write_text("import os\ndef pid(card, root, name, tasks):\n    return os.getpid()\n")
    code = """
        import os, signal, target
        from bench.data import check
        check.inspect = target.pid
        found = check.inspect_all(None, None, range(40), (), 2)
        print(*{next(found)[1] for _ in range(30)}, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = python(code, tmp_path)
    left = {int(pid) for pid in done.stdout.split()}
    assert left and done.returncode == -signal.SIGKILL, done.stderr
    end = time.monotonic() + 30
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left = {pid for pid in left if alive(pid)}
    assert not left
