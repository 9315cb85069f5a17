"""What a start knows from the start before: the index of a folder, its changes, its damage, and who shares it."""

import json
import logging
import os
import pickle
import shutil
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, WARM, environment_of, run_ranks, run_script
from data import index, opening
from data.file_list import Found, Names
from data.images import probe_image
from data.index import Index, cache_folder
from data.scan import Listing, collect, find_files, scan
from data.untrusted import Unreadable, may_pass
from data.video import probe_video
from data.walk import Folder

COUNT = 12  # files of a set


def write_clip(path: Path, times: list[int]) -> None:
    with av.open(str(path), "w", format="matroska") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for stamp in times:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), stamp % 256, np.uint8), "rgb24")
            frame.pts = stamp
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def make_set(root: Path, video: bool) -> Path:
    """Twelve files of two classes: some with remarks or uneven times, and two that cannot be read."""
    for i in range(COUNT):
        path = root / "ab"[i % 2] / f"{i}{'.mkv' if video else '.png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i in (4, 7):
            path.write_text(f"no file {i}")
        elif video:
            write_clip(path, [0, 1, 5, 6 + i] if i % 3 else list(range(3 + i)))
        else:
            Image.new("RGBA" if i % 3 else "RGB", (8, 8), (i, 0, 0, 9)[: 4 if i % 3 else 3]).save(path)
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A folder with a set of images and one of videos."""
    folder = tmp_path_factory.mktemp("sets")
    return make_set(folder / "images", video=False) and make_set(folder / "videos", video=True).parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own, which is not there yet."""
    monkeypatch.setenv("EQM_CACHE", str(tmp_path / "cache" / "eqm"))
    return tmp_path / "cache" / "eqm"


@pytest.fixture
def images(sets, tmp_path) -> Path:
    return shutil.copytree(sets / "images", tmp_path / "data")


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the files that were opened, sorted; emptied by the test."""
    names: list[str] = []

    def counting(probe: Callable) -> Callable:
        def count(path: str) -> object:
            names.append(Path(path).name)
            return probe(path)

        return count

    monkeypatch.setattr(opening, "probe_image", counting(probe_image))
    monkeypatch.setattr(opening, "probe_video", counting(probe_video))
    return names


def contents(found: Found) -> tuple:
    """All that a scan says."""
    return found.classes, list(found), found.labels.dtype, found.unreadable, found.notes


def look(root: Path, video: bool = False) -> tuple:
    return contents(scan(root, video, show_progress=False))


def look_anew(root: Path, monkeypatch: pytest.MonkeyPatch, video: bool = False) -> tuple:
    """What a scan without an index says."""
    with monkeypatch.context() as patch:
        patch.setenv("EQM_CACHE", str(root.parent / f"empty-{len(list(root.parent.iterdir()))}"))
        return look(root, video)


def flat(root: Path) -> Path:
    """Takes the files out of their classes, which a CSV then names, one file in both."""
    rows = [(path.name, path.parent.name) for path in sorted(root.glob("*/*"))]
    for name, label in rows:
        (root / label / name).rename(root / name)
    text = "".join(f"{name},{label}\n" for name, label in [*reversed(rows), ("2.mkv", "b")])
    (root / f"{root.name}.csv").write_text(f"video_name,tag\n{text}")
    return root


@pytest.mark.parametrize("kind", ["images", "videos", "table", "list", "elsewhere"])
def test_a_second_start_opens_nothing_and_finds_the_same(sets, tmp_path, opened, monkeypatch, kind):
    video = kind != "images"
    root = shutil.copytree(sets / ("videos" if video else "images"), tmp_path / "data")
    if kind == "table":
        flat(root)
    if kind == "list":
        (root / "trainlist01.txt").write_text("a/0.mkv 1\na/4.mkv 1\nb/1.mkv 2\n")
    if kind == "elsewhere":
        link = tmp_path / "link"
        link.symlink_to(root)
        (root / "b" / "far.mkv").symlink_to(sets / "videos" / "a" / "0.mkv")
        look(link, video)
        opened.clear()
        monkeypatch.chdir(tmp_path)
        look(Path("data"), video)
        assert opened == []
    first = look(root, video)
    opened.clear()
    assert look(root, video) == first
    assert opened == []
    assert first == look_anew(root, monkeypatch, video)
    if video:
        assert {type(item.video.times) for item in first[1]} == {range, tuple}
    else:
        assert any("white" in note for note in first[4])


def touch_again(path: Path) -> None:
    """Another picture in as many bytes."""
    size, kept = path.stat().st_size, path.read_bytes()
    path.write_bytes(kept[:-1] + b"x")
    assert path.stat().st_size == size


def same_time(path: Path) -> None:
    """More bytes, at the same time."""
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"more")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def mend(root: Path) -> None:
    shutil.copy(root / "a" / "0.png", root / "a" / "4.png")


CHANGES = {
    "size": (lambda root: same_time(root / "a" / "2.png"), ["2.png"]),
    "time": (lambda root: touch_again(root / "a" / "2.png"), ["2.png"]),
    "removed": (lambda root: (root / "a" / "2.png").unlink(), []),
    "added": (lambda root: shutil.copy(root / "a" / "2.png", root / "a" / "10a.png"), ["10a.png"]),
    "renamed": (lambda root: (root / "a" / "2.png").rename(root / "b" / "2.png"), ["2.png"]),
    "swapped": (lambda root: shutil.copy(root / "a" / "4.png", root / "a" / "2.png"), ["2.png"]),
    "mended": (mend, ["4.png"]),
    "a class removed": (lambda root: shutil.rmtree(root / "a"), []),
    "a class added": (
        lambda root: shutil.copytree(root / "a", root / "0"),
        sorted(f"{i}.png" for i in range(0, 12, 2)),
    ),
    "hidden": (lambda root: (root / "a" / "2.png").rename(root / "a" / ".2.png"), []),
    "nothing": (lambda root: None, []),
}


@pytest.mark.parametrize(("change", "names"), CHANGES.values(), ids=CHANGES.keys())
def test_only_what_changed_is_opened(images, opened, monkeypatch, change, names):
    look(images)
    opened.clear()
    change(images)
    found = look(images)
    assert sorted(opened) == names
    opened.clear()
    assert look(images) == found
    assert opened == []
    assert found == look_anew(images, monkeypatch)


def test_changed_videos_take_their_own_times(sets, tmp_path, opened, monkeypatch):
    root = shutil.copytree(sets / "videos", tmp_path / "data")
    look(root, video=True)
    write_clip(root / "a" / "2.mkv", [0, 3, 4, 9, 11])
    write_clip(root / "b" / "5.mkv", [0, 1, 2])
    (root / "b" / "1.mkv").unlink()
    for _ in range(2):
        opened.clear()
        found = look(root, video=True)
    assert opened == []
    assert found == look_anew(root, monkeypatch, video=True)


def test_a_file_that_the_system_refuses_is_tried_at_every_start(images, opened, monkeypatch):
    def refuse(path: str) -> tuple:
        opened.append(Path(path).name)
        if path.endswith("2.png"):
            raise Unreadable("Permission denied") from PermissionError(13, "Permission denied")
        return probe_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(opening, "probe_image", refuse)
        for names in (COUNT, 1, 1):
            opened.clear()
            assert (str(images / "a" / "2.png"), "Permission denied") in look(images)[3]
            assert len(opened) == names
    assert look(images) == look_anew(images, monkeypatch)


def test_an_interrupted_scan_goes_on_where_it_stopped(images, opened, monkeypatch):
    monkeypatch.setattr(opening, "HANDED_OVER_S", -1)
    monkeypatch.setattr(index, "SAVE_S", 0)
    monkeypatch.setattr(index, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    counting = opening.probe_image

    def stop(path: str) -> object:
        if len(opened) == 8:
            raise KeyboardInterrupt
        return counting(path)

    with monkeypatch.context() as patch:
        patch.setattr(opening, "probe_image", stop)
        with pytest.raises(KeyboardInterrupt):
            look(images)
    before = set(opened)
    opened.clear()
    found = look(images)
    assert not before & set(opened)
    assert len(opened) == COUNT - 8
    assert found == look_anew(images, monkeypatch)


def index_file(cache: Path) -> Path:
    (path,) = cache.glob("*.npz")
    return path


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name].copy() for name in archive}


def change_array(name: str, change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """Writes an index whose checksums are right with other numbers in one array."""

    def write(path: Path) -> None:
        arrays = arrays_of(path)
        changed = change(arrays[name])
        np.savez(path, **arrays | ({} if changed is None else {name: changed}))

    return write


def change_about(**values: object) -> Callable[[Path], None]:
    return change_array(
        "about", lambda old: np.frombuffer(json.dumps(json.loads(old.tobytes()) | values).encode(), "u1")
    )


def put(place: object, value: object, field: str | None = None) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        (array[field] if field else array)[place] = value

    return change


def compress(path: Path) -> None:
    np.savez_compressed(path, **arrays_of(path))


def pickled(path: Path) -> None:
    np.savez(path, **arrays_of(path) | {"codes": np.array([{"a": 1}] * COUNT, object)})


def lacks_an_array(path: Path) -> None:
    arrays = arrays_of(path)
    del arrays["stats"]
    np.savez(path, **arrays)


def claim_much(path: Path) -> None:
    """An array whose header claims 2^56 numbers."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = members["codes.npy"]
    members["codes.npy"] = header.replace(f"({COUNT},), }}".encode(), b"(72057594037927936,), }")[: len(header)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no index"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"names": []})),
    "objects": pickled,
    "compressed": compress,
    "lacks an array": lacks_an_array,
    "claims much": claim_much,
    "a plain array": lambda path: np.save(path.open("wb"), np.arange(9)),
    "about: no JSON": change_array("about", lambda old: np.frombuffer(b"{", "u1")),
    "about: nested": change_array("about", lambda old: np.frombuffer(b"[" * 100_000, "u1")),
    "about: a list": change_array("about", lambda old: np.frombuffer(b"[]", "u1")),
    "outcomes: a number": change_about(outcomes=3),
    "outcomes: none": change_about(outcomes=[]),
    "outcomes: another kind": change_about(outcomes=[["passing", ["x"]]] * 4),
    "ends: too few": change_array("ends", lambda old: old[:-1]),
    "ends: descending": change_array("ends", put(3, 10**6)),
    "ends: beyond": change_array("ends", put(-1, 10**6)),
    "ends: of 32 bits": change_array("ends", lambda old: old.astype("i4")),
    "stats: of one number": change_array("stats", lambda old: old[:, :1]),
    "stats: flat": change_array("stats", lambda old: old[:, 0]),
    "codes: beyond": change_array("codes", put(0, 99)),
    "codes: negative": change_array("codes", put(0, -1)),
    "codes: too many": change_array("codes", lambda old: np.append(old, old[:1])),
    "rows: too few": change_array("rows", lambda old: old[:-1]),
    "length: negative": change_array("rows", put(0, -1, "length")),
    "length: huge": change_array("rows", put(0, 2**40, "length")),
    "length: none": change_array("rows", put(0, 0, "length")),
    "rate: NaN": change_array("rows", put(0, np.nan, "rate")),
    "rate: zero": change_array("rows", put(0, 0, "rate")),
    "margin: negative": change_array("rows", put(0, -5, "margin")),
    "step: negative": change_array("rows", put(0, -1, "step")),
    "place: beyond": change_array("rows", put(slice(None), 10**6, "place")),
    "place: negative": change_array("rows", put(slice(None), -1, "place")),
    "times: gone": change_array("times", lambda old: old[:0]),
    "of another set": change_about(root="/another/set"),
    "of images": change_about(video=False),
    "by other readers": change_about(readers="PyAV 1"),
    "of another format": change_about(format="EqM index 99"),
}


@pytest.fixture(scope="module")
def indexed(sets, tmp_path_factory) -> tuple[Path, bytes, tuple]:
    """The videos, their index, and what a scan says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQM_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = look(sets / "videos", video=True)
        return sets / "videos", Index(sets / "videos", video=True).path().read_bytes(), found


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_or_foreign_index_is_made_anew_with_a_word(indexed, cache, opened, caplog, damage):
    root, good, found = indexed
    cache.mkdir(parents=True)
    path = Index(root, video=True).path()
    path.write_bytes(good)
    assert look(root, video=True) == found
    assert opened == []
    damage(path)
    assert look(root, video=True) == found
    assert len(opened) == COUNT
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"the index {path} ")
    assert record.getMessage().endswith(": it is made anew")
    assert len(record.getMessage().splitlines()) == 1
    opened.clear()
    assert look(root, video=True) == found
    assert opened == []


def test_cut_bytes_and_flipped_bits_never_change_what_is_found(indexed, cache, opened):
    root, good, found = indexed
    cache.mkdir(parents=True)
    path, random = Index(root, video=True).path(), np.random.default_rng(0)
    changed = [good[:end] for end in random.integers(0, len(good), 40)]
    for place in random.integers(0, len(good), 120):
        changed.append(good[:place] + bytes([good[place] ^ 1 << int(random.integers(8))]) + good[place + 1 :])
    for data in changed:
        path.write_bytes(data)
        known = Index(root, video=True).read()
        listing = find_files(root, video=True)
        results = known.of(listing.paths.below(str(root)), index.stats_of(listing.paths))
        if len(known.names):  # the bit is one that no reader looks at
            assert contents(collect(str(root), listing, results))[:4] == found[:4]


def test_decoding_all_leaves_the_index_alone(images, opened, monkeypatch, cache):
    scan(images, video=False, show_progress=False, decode=True)
    assert not cache.exists()
    look(images)
    opened.clear()
    scan(images, video=False, show_progress=False, decode=True)
    assert len(opened) == COUNT


@pytest.mark.parametrize("problem", ["a file in its place", "a folder that may not be written", "a full disk"])
def test_a_cache_folder_that_takes_no_files_is_one_warning(images, cache, opened, caplog, monkeypatch, problem):
    found = look_anew(images, monkeypatch)
    if problem == "a file in its place":
        cache.parent.mkdir()
        cache.write_text("")
    else:
        number = 28 if problem == "a full disk" else 30

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), str(cache))

        monkeypatch.setattr(index, "write_whole", fail)
        monkeypatch.setattr(index, "SAVE_S", 0)
        monkeypatch.setattr(opening, "HANDED_OVER_S", -1)
    opened.clear()
    assert look(images) == found
    assert len(opened) == COUNT
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "every start opens all its files" in record.getMessage()
    assert str(cache) in record.getMessage()


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(images, cache):
    look(images)
    name = index_file(cache).name
    for pid, age_s in ((1, 10**5), (2, 0)):
        left = cache / f"{name}.{pid}.tmp"
        left.write_bytes(b"half")
        os.utime(left, (time.time() - age_s,) * 2)
    (images / "a" / "2.png").unlink()
    look(images)
    assert {path.name for path in cache.iterdir()} == {name, f"{name}.2.tmp"}


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        (PermissionError(13, "Permission denied"), True),
        (av.error.PermissionError(13, "Permission denied"), True),
        (av.error.FFmpegError(5, "Input/output error"), True),
        (av.error.ExitError(1414092869, "Exit"), True),
        (av.error.InvalidDataError(1094995529, "Invalid data"), False),
        (av.error.ArgumentError(22, "Invalid argument"), False),
        (OSError("image file is truncated"), False),
        (None, False),
    ],
)
def test_errors_of_the_system_may_pass_and_those_of_the_contents_do_not(cause, passes):
    with pytest.raises(Unreadable) as caught:
        raise Unreadable("it cannot be read") from cause
    assert may_pass(caught.value) == passes


def test_an_index_that_is_whole_is_not_written_again(images, cache, monkeypatch):
    look(images)
    monkeypatch.setattr(index, "write_whole", lambda *_, **__: pytest.fail("written again"))
    look(images)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"EQM_CACHE": "/fast/indexes", "XDG_CACHE_HOME": "/xdg"}, "/fast/indexes"),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/me"}, "/xdg/eqm"),
        ({"HOME": "/home/me"}, "/home/me/.cache/eqm"),
        ({"EQM_CACHE": "", "XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/eqm"),
    ],
)
def test_the_index_lies_in_the_users_cache_folder(monkeypatch, variables, folder):
    for name in ("EQM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == folder


# check_data.py, which waits with its written index until two of it have one: neither can find that of the other.
AT_ONCE = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "EqM")!r})
import check_data
from data import index
from runtime import cli

def wait_for_both():
    Path(f"{{os.getpid()}}.written").touch()
    while len(list(Path().glob("*.written"))) < 2:
        time.sleep(0.01)

write_whole = index.write_whole
index.write_whole = lambda path, save, **more: write_whole(path, lambda made: (save(made), wait_for_both()), **more)
cli.run(check_data.main, "")
"""


def test_two_processes_at_once_leave_a_whole_index(images, tmp_path, cache):
    (tmp_path / "at_once.py").write_text(AT_ONCE)
    environment = environment_of()
    if not WARM.fits(environment):
        pytest.skip("this system has no quick processes")
    both = [WARM.start(tmp_path / "at_once.py", images, cwd=tmp_path, environment=environment) for _ in range(2)]
    said = [process.communicate(60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    third = run_script("check_data.py", images, cwd=tmp_path)
    assert {out for out, _ in said} == {third.stdout}
    last_lines = [error.splitlines()[-1] for _, error in said]
    assert all(line.startswith("checking files: 100%") for line in last_lines), last_lines  # and no warning after it
    assert third.stderr == ""
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


def test_ranks_start_from_the_index_of_a_run_of_one_process(images, tmp_path):
    for name in ("4.png", "7.png"):
        next(images.glob(f"*/{name}")).unlink()
    first = run_script("check_data.py", images, cwd=tmp_path)
    assert "10/10" in first.stderr
    flags = ["--model", "EqM-Ti/4", "--image-size", 8, "--max-steps", 1, "--global-batch-size", 4]
    run = run_ranks(2, "train.py", "--data-path", images, *flags, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "10 images, 2 classes" in run.stdout
    assert "checking files" not in run.stderr


def test_names_of_any_bytes_are_kept_and_chosen():
    given = [b"a/\xff.png", "a/é\n.png".encode(), b"a/" + b"n" * 200, b"b/x"] * 3000
    names = Names(given)
    assert list(names.encoded()) == given
    assert list(names) == [os.fsdecode(name) for name in given] == [names[i] for i in range(len(names))]
    lists = Names.of_lists([b"\0".join(given[:5]), b"\0".join(given[5:])])
    assert list(lists.encoded()) == given
    mask = np.arange(len(given)) % 3 == 0
    assert list(names.where(mask).encoded()) == given[::3]
    assert list(names.below("a").encoded())[:4] == [name.removeprefix(b"a/") for name in given[:4]]


def test_a_file_takes_bytes_and_no_object(tmp_path):
    count = 100_000
    folder = Folder("class", "/data/class", b"\0".join(b"image_%07d.png" % i for i in range(count)))
    tracemalloc.start()
    try:
        listing = Listing.of_folders([folder], ())
        results = opening.Results(count, video=True)
        kept, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    path = len(listing.paths[0])
    assert kept < count * (path + 2 * 8 + 4 + 64), results
    assert highest < 4 * kept
