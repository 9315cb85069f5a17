import os
import signal
import sys
from pathlib import Path

import pytest

from conftest import ROOT, run_command
from runtime.files import leftovers, write_whole


def test_a_file_is_written_whole_in_the_place_of_another(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"first", b"second"):
        write_whole(path, lambda temporary, content=content: temporary.write_bytes(content))
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_where_writing_fails_the_file_is_what_it_was(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_bytes(b"first")

    def write(temporary):
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        write_whole(path, write)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_at_the_end_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.json", lambda temporary: temporary.write_bytes(b"half"))
    assert not list(tmp_path.iterdir())


def test_bytes_are_on_the_disk_before_the_name_and_the_name_at_the_end(tmp_path, monkeypatch):
    path, steps = tmp_path / "a.json", []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(descriptor):
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(("sync", "folder" if target.is_dir() else target.read_bytes()))
        fsync(descriptor)

    def seen_replace(source, target):
        steps.append(("rename", target.name))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    write_whole(path, lambda temporary: temporary.write_bytes(b"whole"))
    assert steps == [("sync", b"whole"), ("rename", "a.json"), ("sync", "folder")]


def test_a_killed_program_leaves_no_file_but_a_temporary_one(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "EqM")!r})
from pathlib import Path
from runtime.files import write_whole

def write(temporary):
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), {int(signal.SIGKILL)})

write_whole(Path("a.json"), write)
"""
    assert run_command(sys.executable, "-c", code, cwd=tmp_path).returncode == -signal.SIGKILL
    assert not (tmp_path / "a.json").exists()
    assert list(tmp_path.iterdir()) == list(leftovers(tmp_path, "*.json")) != []
