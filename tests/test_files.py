"""Files that are there whole or not at all, whoever else writes them, and readable by whom the user wants."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from bench.errors import BenchError
from bench.files import replacing, write_atomically


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_a_new_file_has_the_mode_that_the_user_wants(tmp_path, umask):
    """safetensors alone would keep it from everybody else, and nobody else could use a trained cell or a cache."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "of" / "tensors") as temporary:
            save_file({"a": torch.ones(2)}, temporary)
        write_atomically(tmp_path / "text", "ä\n")
    finally:
        os.umask(before)
    for path in (tmp_path / "of" / "tensors", tmp_path / "text"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa4\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a name")])
def test_what_fails_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["record.json"]


def test_what_a_killed_writer_left_does_not_pile_up(tmp_path):
    """Of a checkpoint, say, which its cell alone writes."""
    path = tmp_path / "checkpoint"
    killed = [replacing(path, alone=True) for _ in range(3)]  # they never end
    for writer in killed:
        writer.__enter__().write_text("half")
    assert len(os.listdir(tmp_path)) == 1
    with replacing(path, alone=True) as temporary:
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == ["checkpoint"] and path.read_text() == "whole"


def test_writers_of_one_process_number_do_not_meet(tmp_path):
    """As in containers that share a folder."""
    path, failed = tmp_path / "sample", []

    def write(letter):
        for _ in range(200):
            try:
                write_atomically(path, letter * 5000)
                text = path.read_text()
                assert len(text) == 5000 and len(set(text)) == 1
            except Exception as error:
                failed.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed and os.listdir(tmp_path) == ["sample"]


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot write .*file/record.json: .*; choose another folder"):
        write_atomically(tmp_path / "file" / "record.json", "{}")


def test_a_name_that_is_no_utf8_is_told_in_escapes(tmp_path):
    write_atomically(tmp_path / "a", "file \udcff.json")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "file \\udcff.json"
