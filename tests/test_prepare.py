import fcntl
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from conftest import ROOT, BlockMeans, begun, item_frames, make_pack, run_command, run_ranks, run_script
from data.form import Form
from data.packs.pack import is_pack, open_pack
from data.packs.packing import finish, missing_shards
from data.packs.workers import pack_shards
from data.scan import scan
from data.video import probe_video, read_frames
from make_moving_shapes import write_avi
from runtime.errors import UserError
from runtime.files import contents_checksum, file_checksum, read_json, write_json

PREPARE = ROOT / "EqM" / "prepare.py"
OPTIONS = ("--video", "--image-size", 16)
FORM = Form(video=True, image_size=16)


def contents(folder: Path) -> dict[str, bytes]:
    """The shards, and the index without the times and the checksum over them."""
    index = json.loads((folder / "index.json").read_text())
    del index["checksum"]
    for record in index["shards"]:
        del record["mtime_ns"]
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")} | {"index": json.dumps(index).encode()}


def noise_clips(folder: Path, count: int, frames: int = 12, side: int = 32) -> Path:
    """Clips that differ, in one class."""
    (folder / "A").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        write_avi(folder / "A" / f"{i:04d}.avi", rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8))
    return folder


def test_a_set_is_packed_and_the_summary_says_how_much_it_is(shapes, tmp_path):
    result = run_script("prepare.py", shapes, tmp_path / "pack", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    whole, speed = result.stdout.splitlines()
    size = 256 * 16 * 16 * 3
    assert whole == (
        f"{tmp_path}/pack is whole: 16 clips of 4 classes, 256 frames, {size:,} bytes, 0 unreadable files skipped"
    )
    assert speed.startswith("packed 16 clips in ")
    assert "packing: 100%" in result.stderr
    assert sum(path.stat().st_size for path in (tmp_path / "pack").glob("*.bin")) == size


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_pack_does_not_depend_on_the_number_of_workers(shapes, tmp_path, num_workers):
    result = run_script("prepare.py", shapes, tmp_path / "a", *OPTIONS, "--num-workers", num_workers, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    make_pack(shapes, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_ranks_share_the_shards(shapes, tmp_path):
    options = (*OPTIONS, "--num-workers", 1)
    result = run_ranks(2, "prepare.py", shapes, tmp_path / "a", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "packed 16 clips" in result.stdout
    assert "8/8" in result.stderr  # rank 0's share
    make_pack(shapes, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("encode_in_main", [False, True])
def test_latents_are_encoded_in_the_workers_or_in_the_main_process(shapes, tmp_path, encode_in_main):
    processes = multiprocessing.SimpleQueue()

    def encode(frames):
        processes.put(os.getpid())
        return BlockMeans.encode_moments(frames)

    plan = begun(shapes, tmp_path / "a", FORM, BlockMeans.space)
    with tqdm(total=16, file=io.StringIO()) as bar:
        pack_shards(plan, missing_shards(plan), 2, encode, encode_in_main, bar)
    assert bar.n == 16
    finish(plan)
    calls = 2 * 16  # a chunk of frames for each shard, and their mirrored copies
    assert ({processes.get() for _ in range(calls)} == {os.getpid()}) == encode_in_main
    make_pack(shapes, tmp_path / "b", vae=BlockMeans)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("encode_in_main", [False, True])
def test_ctrl_c_ends_packing_in_the_middle_of_a_shard(shapes, tmp_path, monkeypatch, encode_in_main):
    monkeypatch.setattr("data.packs.format.MIN_SHARDS", 2)
    monkeypatch.setattr("data.packs.writer.CHUNK_FRAMES", 1)
    main, calls = os.getpid(), tmp_path / "calls"

    def encode(frames):
        with calls.open("a") as file:  # no lock, which a process that ends could leave locked
            file.write(".")
        if calls.stat().st_size >= 5:
            with suppress(FileExistsError):
                (tmp_path / "once").mkdir()
                os.kill(main, signal.SIGINT)
        time.sleep(0.02)
        return BlockMeans.encode_moments(frames)

    plan = begun(shapes, tmp_path / "pack", FORM, BlockMeans.space)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        pack_shards(plan, [0, 1], 2, encode, encode_in_main, tqdm(disable=True))
    signal.signal(signal.SIGINT, before)
    assert calls.stat().st_size < 100  # of 512
    assert not multiprocessing.active_children()
    assert [path.name for path in (tmp_path / "pack").iterdir()] == ["settings.json"]


def test_ctrl_c_that_comes_while_processes_start_is_not_lost(shapes, tmp_path, monkeypatch):
    class Executor(ProcessPoolExecutor):
        def submit(self, *arguments):
            with suppress(KeyboardInterrupt):  # so does Python while it forks
                signal.raise_signal(signal.SIGINT)
            return super().submit(*arguments)

    monkeypatch.setattr("data.packs.workers.ProcessPoolExecutor", Executor)
    plan = begun(shapes, tmp_path / "pack", FORM, None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        pack_shards(plan, [0, 1], 2, None, False, tqdm(disable=True))
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler
    assert not multiprocessing.active_children()


def test_ctrl_c_that_comes_while_futures_are_locked_ends_packing(shapes, tmp_path, monkeypatch):
    def wait(pending, *arguments):
        """As if Ctrl-C came inside of it, where a KeyboardInterrupt leaves the locks of futures behind."""
        locked = [future._condition for future in pending]
        for condition in locked:
            condition.acquire()
        signal.raise_signal(signal.SIGINT)
        for condition in locked:
            condition.release()
        return futures.wait(pending, *arguments)

    monkeypatch.setattr("data.packs.workers.wait", wait)
    plan = begun(shapes, tmp_path / "pack", FORM, None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        pack_shards(plan, [0, 1, 2, 3], 2, None, False, tqdm(disable=True))
    signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()


def test_a_size_that_the_vae_cannot_halve_is_refused(shapes, tmp_path):
    with pytest.raises(UserError, match="--image-size 20 is not a multiple of the VAE's 8"):
        make_pack(shapes, tmp_path / "pack", image_size=20, vae=BlockMeans)


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory) -> Path:
    return noise_clips(tmp_path_factory.mktemp("long") / "train", 30, frames=60, side=96)


def wait_for_shards(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("shard-*.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_goes_on_with_the_missing_shards(long_clips, tmp_path, how):
    source = long_clips
    command = [sys.executable, PREPARE, source, tmp_path / "a", *OPTIONS]
    arguments = [str(part) for part in command]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background ignores Ctrl-C, and what it starts would too.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(arguments, preexec_fn=heed, start_new_session=True, **pipes) as process:
        wait_for_shards(tmp_path / "a", 3)
        workers = children(process.pid)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # Ctrl-C reaches every process
        else:
            process.send_signal(how)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == (130 if how == signal.SIGINT else -how), errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives the run"
        time.sleep(0.02)
    assert not list((tmp_path / "a").glob("*.tmp"))
    with pytest.raises(UserError, match="half-made"):
        is_pack(tmp_path / "a")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("shard-*.json")}
    assert 3 <= len(done) < 30
    result = run_command(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"packed {30 - len(done)} clips" in result.stdout
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in done.items())
    assert not list((tmp_path / "a").glob("*.tmp"))
    make_pack(source, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """What changes where anything in a folder is written, be it for a moment: its own time tells of every name."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder, *folder.iterdir())}


def test_a_whole_pack_is_checked_and_nothing_is_written(shapes, tmp_path):
    make_pack(shapes, tmp_path / "pack")
    before = written(tmp_path / "pack")
    result = run_script("prepare.py", shapes, tmp_path / "pack", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "checking the pack: 100%" in result.stderr
    assert f"{tmp_path}/pack is whole: 16 clips" in result.stdout
    assert written(tmp_path / "pack") == before


def test_a_moved_pack_of_a_moved_source_is_checked_and_mended(shapes, tmp_path):
    source, folder = Path(shutil.copytree(shapes, tmp_path / "old")), tmp_path / "pack"
    make_pack(source, folder)
    source, folder = source.rename(tmp_path / "new"), folder.rename(tmp_path / "moved")
    before = written(folder)
    make_pack(source, folder)
    assert written(folder) == before
    whole = contents(folder)
    (folder / "shard-00002.bin").unlink()
    make_pack(source, folder)
    assert contents(folder) == whole


def test_a_source_that_is_gone_is_one_line(shapes, tmp_path):
    make_pack(shapes, tmp_path / "pack")
    result = run_script("prepare.py", tmp_path / "gone", tmp_path / "pack", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"{tmp_path}/gone is not a folder" in line


@pytest.mark.parametrize("relative", [False, True])
def test_a_source_behind_symbolic_links_gives_the_same_pack(shapes, tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "real").mkdir()
    for folder in shapes.iterdir():
        (tmp_path / "deep" / "real" / folder.name).symlink_to(folder)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "real")
    source = Path("link") if relative else tmp_path / "link"
    pack, straight = make_pack(source, tmp_path / "pack"), make_pack(shapes, tmp_path / "straight")
    assert contents(tmp_path / "pack") == contents(tmp_path / "straight")
    assert pack.paths == [str(path.relative_to(shapes)) for path in sorted(shapes.glob("*/*.avi"))]
    for ours, theirs in zip(pack.found(), straight.found(), strict=True):
        assert Path(ours.path).samefile(theirs.path)


def test_a_table_that_names_the_folder_itself_works_behind_a_symbolic_link(tmp_path):
    clips = noise_clips(tmp_path / "real", 3)
    names = [path.rename(clips / path.name).name for path in sorted((clips / "A").iterdir())]
    (clips / "A").rmdir()
    (clips / "real.csv").write_text("\n".join(["clip_name,clip_path,label", *(f"{n},/real/{n},A" for n in names)]))
    (tmp_path / "link").symlink_to(clips)
    pack = make_pack(tmp_path / "link", tmp_path / "pack")
    assert pack.paths == names
    assert all(Path(item.path).is_file() for item in pack.found())


def test_a_second_run_into_a_folder_is_refused_while_the_first_goes_on(shapes, tmp_path):
    (tmp_path / "pack").mkdir()
    descriptor = os.open(tmp_path / "pack", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    result = run_script("prepare.py", shapes, tmp_path / "pack", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"another run is packing into {tmp_path}/pack: let it end" in line
    assert not list((tmp_path / "pack").glob("shard-*"))
    os.close(descriptor)
    result = run_script("prepare.py", shapes, tmp_path / "pack", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_two_runs_with_other_settings_do_not_mix(shapes, tmp_path):
    """The settings of a run that comes too late are not written, and its shards do not count."""
    (tmp_path / "pack").mkdir()
    descriptor = os.open(tmp_path / "pack", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    result = run_script("prepare.py", shapes, tmp_path / "pack", "--video", "--image-size", 24, cwd=tmp_path)
    assert result.returncode == 1
    assert "another run is packing into" in result.stderr
    assert not list((tmp_path / "pack").iterdir())
    os.close(descriptor)

    make_pack(shapes, tmp_path / "other", image_size=24)
    plan = begun(shapes, tmp_path / "pack", FORM, None)
    for path in (tmp_path / "other").glob("shard-*"):
        shutil.copy2(path, tmp_path / "pack")
    record = tmp_path / "pack" / "shard-00003.json"
    assert missing_shards(plan) == list(range(16))
    same_size = read_json(record) | {"items": read_json(record)["items"], "bytes": 16 * 16 * 16 * 3}
    for settings, missing in (
        (same_size["settings_crc32"], True),
        (contents_checksum(plan.settings.identity()), False),
    ):
        (tmp_path / "pack" / "shard-00003.bin").write_bytes(bytes(same_size["bytes"]))
        said = same_size | {"settings_crc32": settings, "crc32": file_checksum(record.with_suffix(".bin"))}
        write_json(record, said)
        assert (3 in missing_shards(plan)) == missing


def test_shards_of_a_pack_that_does_not_say_its_settings_still_count(shapes, tmp_path):
    make_pack(shapes, tmp_path / "pack")
    for path in (tmp_path / "pack").glob("shard-*.json"):
        record = read_json(path)
        del record["settings_crc32"]
        write_json(path, record)
    before = written(tmp_path / "pack")
    make_pack(shapes, tmp_path / "pack")
    assert written(tmp_path / "pack") == before


def test_what_a_killed_run_left_is_not_taken_for_shards_and_is_removed(shapes, tmp_path):
    make_pack(shapes, tmp_path / "whole")
    (tmp_path / "pack").mkdir()
    names = ("settings.json", "shard-00000.bin", "shard-00001.json", "index.json")
    for name in names:
        shutil.copy(tmp_path / "whole" / name, tmp_path / "pack" / f"{name}.4711.tmp")
        if name == "settings.json":
            assert missing_shards(begun(shapes, tmp_path / "pack", FORM, None)) == list(range(16))
    (tmp_path / "pack" / "mine.tmp").write_text("notes")
    assert missing_shards(begun(shapes, tmp_path / "pack", FORM, None)) == list(range(16))
    with pytest.raises(UserError, match="half-made"):
        is_pack(tmp_path / "pack")
    make_pack(shapes, tmp_path / "pack")
    assert [path.name for path in (tmp_path / "pack").glob("*.tmp")] == ["mine.tmp"]
    assert contents(tmp_path / "pack") == contents(tmp_path / "whole")


def test_other_settings_for_a_pack_are_refused_with_both_values(shapes, tmp_path):
    pack = tmp_path / "pack"
    make_pack(shapes, pack)
    for changes, words in (
        ({"image_size": 24}, "with image_size 16, and this run has 24"),
        ({"vae": BlockMeans}, "with values pixels, and this run has latents"),
    ):
        with pytest.raises(UserError, match=words):
            make_pack(**{"source": shapes, "folder": pack} | changes)
    assert len(open_pack(pack, False)) == 16


def test_other_files_in_the_source_are_refused(tmp_path):
    source = noise_clips(tmp_path / "train", 4)
    make_pack(source, tmp_path / "pack")
    (source / "A" / "0000.avi").rename(source / "A" / "0009.avi")
    with pytest.raises(UserError, match="names_crc32"):
        make_pack(source, tmp_path / "pack")


def test_a_folder_of_something_else_is_left_alone(shapes, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    result = run_script("prepare.py", shapes, tmp_path / "mine", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 1
    assert "holds something else than a pack" in result.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_unreadable_files_are_skipped_counted_and_named(tmp_path):
    source = noise_clips(tmp_path / "train", 40)
    whole = (source / "A" / "0000.avi").read_bytes()
    for name, content in (("empty", b""), ("cut", whole[: whole.index(b"movi")]), ("text", b"not a video\n" * 50)):
        (source / "A" / f"{name}.avi").write_bytes(content)
    (source / "A" / "0003.avi").write_bytes(whole[: len(whole) // 2])
    result = run_script("prepare.py", source, tmp_path / "pack", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "40 clips of 1 classes" in result.stdout
    assert "3 unreadable files skipped" in result.stdout
    pack = open_pack(tmp_path / "pack", False)
    assert pack.found().unreadable == scan(source, True, False).unreadable
    assert all(f"skipped unreadable {path}: " in result.stdout for path, _ in pack.found().unreadable)
    assert 1 <= pack.lengths[3] < 12
    assert (np.delete(pack.lengths, 3) == 12).all()


def test_too_many_unreadable_files_are_an_error_and_are_tried_again(tmp_path):
    source = noise_clips(tmp_path / "train", 8)
    broken = source / "A" / "0001.avi"
    content = broken.read_bytes()
    for name in ("0001.avi", "0002.avi"):
        (source / "A" / name).write_bytes(b"")
    result = run_script("prepare.py", source, tmp_path / "pack", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 1
    assert f"2 of 8 files in {source} cannot be read, for example {broken}" in result.stderr
    with pytest.raises(UserError, match="half-made"):
        is_pack(tmp_path / "pack")
    for name in ("0001.avi", "0002.avi"):
        (source / "A" / name).write_bytes(content)
    assert len(make_pack(source, tmp_path / "pack")) == 8


def test_a_set_without_one_readable_file_is_one_line_and_is_tried_again(tmp_path):
    source = noise_clips(tmp_path / "train", 2)
    contents = {path: path.read_bytes() for path in sorted(source.glob("A/*.avi"))}
    for path in contents:
        path.write_bytes(b"not a video\n" * 50)
    result = run_script("prepare.py", source, tmp_path / "pack", *OPTIONS, cwd=tmp_path)
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"prepare.py: error: no readable clip in {source}: {next(iter(contents))}: ")
    assert "Traceback" not in result.stderr
    for path, content in contents.items():
        path.write_bytes(content)
    assert len(make_pack(source, tmp_path / "pack")) == 2


def test_files_to_append_of_which_none_is_readable_are_one_line_and_the_pack_stays_whole(tmp_path):
    source = noise_clips(tmp_path / "train", 2)
    before = make_pack(source, tmp_path / "pack")
    added = source / "A" / "9.avi"
    added.write_bytes(b"not a video\n" * 50)
    result = run_script("prepare.py", source, tmp_path / "pack", *OPTIONS, "--append", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"prepare.py: error: no readable clip in {source}: {added}: ")
    assert open_pack(tmp_path / "pack", False).paths == before.paths


def test_a_full_disk_is_one_line_and_keeps_the_finished_shards(tmp_path):
    source = noise_clips(tmp_path / "train", 6, frames=4)
    long_clip = source / "A" / "0005.avi"
    write_avi(long_clip, np.zeros((80, 32, 32, 3), np.uint8))
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
    limited += "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
    limited += "runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = (PREPARE, source, tmp_path / "pack", *OPTIONS, "--num-workers", 1)
    result = run_command(sys.executable, "-c", limited, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "cannot be written: File too large: make room and run the same command again" in result.stderr
    assert len(list((tmp_path / "pack").glob("*.bin"))) == 5
    assert not list((tmp_path / "pack").glob("*.tmp"))
    result = run_script("prepare.py", *arguments[1:], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "packed 1 clips" in result.stdout


@pytest.mark.parametrize("encode_in_main", [False, True])
def test_a_disk_that_is_full_when_the_shard_is_flushed_leaves_no_shard(shapes, tmp_path, monkeypatch, encode_in_main):
    plan = begun(shapes, tmp_path / "pack", FORM, BlockMeans.space)

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device: make room"):
        pack_shards(plan, [0, 1], 1, BlockMeans.encode_moments, encode_in_main, tqdm(disable=True))
    assert [path.name for path in (tmp_path / "pack").iterdir()] == ["settings.json"]


def test_a_worker_that_is_killed_ends_the_run_in_one_line(long_clips, tmp_path):
    arguments = [str(part) for part in (PREPARE, long_clips, tmp_path / "pack", *OPTIONS, "--num-workers", 2)]
    with subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True) as process:
        wait_for_shards(tmp_path / "pack", 1)
        workers = children(process.pid)
        os.kill(workers[0], signal.SIGKILL)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "prepare.py: error: a packing process ended too early: run the same command again, with fewer" in errors
    assert "Traceback" not in errors
    assert len(workers) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_damaged_copies_of_a_clip_are_packed_or_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("data.scan.MAX_UNREADABLE", 1.0)
    source = noise_clips(tmp_path / "train", 1)
    whole = (source / "A" / "0000.avi").read_bytes()
    rng = np.random.default_rng(1)
    for i in range(1, 301):
        data = bytearray(whole)
        for place in rng.integers(len(data) if i % 2 else 3000, size=1 + i % 40):
            data[place] = rng.integers(256)
        (source / "A" / f"{i:04d}.avi").write_bytes(data[: rng.integers(len(data))] if i % 5 == 0 else data)
    pack = make_pack(source, tmp_path / "pack")
    assert len(pack) + len(pack.unreadable) == 301
    assert len(pack) > 50
    assert len(pack.unreadable) > 5
    assert all(item_frames(pack, i).shape == (pack.lengths[i], 16, 16, 3) for i in range(len(pack)))
    assert pack.lengths.min() >= 1


def peak_memory(*arguments: object, cwd: Path) -> int:
    """The most memory that any process of a command used, in KiB."""
    code = """
        import resource, subprocess, sys
        subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    """
    result = run_command(sys.executable, "-c", textwrap.dedent(code), *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_items_or_their_length(tmp_path):
    few = noise_clips(tmp_path / "few", 20)
    many = noise_clips(tmp_path / "many", 1)
    for i in range(1, 2000):
        os.link(many / "A" / "0000.avi", many / "A" / f"{i:04d}.avi")
    long_one = noise_clips(tmp_path / "long", 1, frames=4000, side=32)
    options = ("--video", "--image-size", 64)
    small, large, long = (
        peak_memory(PREPARE, source, tmp_path / f"pack-{source.name}", *options, cwd=tmp_path)
        for source in (few, many, long_one)
    )
    print(f"peak memory, KiB: 20 clips {small}, 2,000 clips {large}, a clip of 4,000 frames {long}")
    assert large < small + 20_000
    assert long < small + 20_000


def idle_cores() -> float:
    """Cores that nothing uses, over a second."""

    def idle_s() -> float:
        return int(Path("/proc/stat").read_text().split()[4]) / os.sysconf("SC_CLK_TCK")

    before = idle_s()
    time.sleep(1)
    return idle_s() - before


@pytest.mark.slow
def test_two_workers_are_faster_than_one(tmp_path):
    if idle_cores() < 1.7:
        pytest.skip("needs two cores that nothing else uses")
    source = noise_clips(tmp_path / "train", 64, frames=100, side=96)
    seconds = {1: 1e9, 2: 1e9}
    for workers in 4 * (1, 2):  # other work on the machine slows either down, so that the best times count
        plan = begun(source, tmp_path / "pack", Form(video=True, image_size=64), None)
        start = time.perf_counter()
        pack_shards(plan, missing_shards(plan), workers, None, False, tqdm(disable=True))
        seconds[workers] = min(seconds[workers], time.perf_counter() - start)
        shutil.rmtree(tmp_path / "pack")
    print(f"two workers are {seconds[1] / seconds[2]:.2f} times as fast as one")
    assert seconds[1] / seconds[2] > 1.2


def test_damaged_real_clips_give_the_frames_that_still_decode(real_clips, tmp_path):
    clip = sorted(real_clips.glob("*/*.avi"))[0]
    (tmp_path / "train" / "A").mkdir(parents=True)
    data = clip.read_bytes()
    for i in range(10):
        (tmp_path / "train" / "A" / f"{i}.avi").write_bytes(data if i else data[: len(data) // 2])
    pack = make_pack(tmp_path / "train", tmp_path / "pack")
    info = probe_video(clip)
    assert 1 <= pack.lengths[0] < len(info.times)
    whole = read_frames(clip, info, range(5), 16)
    assert np.array_equal(item_frames(pack, 0)[:5], whole)
    assert np.array_equal(item_frames(pack, 1)[:5], whole)
