import ctypes
import errno
import json
import os
import pickle
import shlex
import shutil
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, BlockMeans, item_frames, make_pack, run_script
from data.batches import EpochStream, make_loader
from data.clips import Samples
from data.form import Form
from data.packs.dataset import PackedSamples, unpack
from data.packs.format import shard_path
from data.packs.pack import is_pack, open_pack, read_pack
from data.scan import scan
from data.source import Source
from data.video import write_video
from runtime.errors import UserError
from runtime.files import file_checksum, read_json, write_json

CLIPS = Form(video=True, image_size=16, clip_len=4, frame_interval=3, flip=True)
IMAGES = Form(video=False, image_size=16, flip=True)


@pytest.fixture(scope="module")
def packed(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "shapes"
    make_pack(shapes, folder)
    return folder


@pytest.fixture
def copied(packed, tmp_path) -> Path:
    """A copy of the pack, to damage; the times are kept."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def make_images(folder: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30 - i, 3), dtype=np.uint8)).save(path)
    return folder


def batches(samples: Samples | PackedSamples, num_workers: int = 0, rank: int = 0, ranks: int = 1) -> list[dict]:
    """Batches as the device sees them: those of a pack are unpacked."""
    is_packed = isinstance(samples, PackedSamples)
    stream = EpochStream(
        len(samples.pack) if is_packed else len(samples.found), 4, 12, seed=3, first=2, rank=rank, ranks=ranks
    )
    loaded = list(make_loader(samples, stream, num_workers, pin_memory=False))
    for batch in loaded if is_packed else []:
        batch["x"] = unpack(batch["x"], batch.pop("flip"), samples.pack.settings.video)
    return loaded


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a["unreadable"] == b["unreadable"]
        for key in ("x", "label", "seconds_per_frame"):
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize(("clip_len", "interval"), [(4, 1), (4, 3), (8, 3), (1, 1)])
def test_a_pixel_pack_gives_the_batches_that_the_files_give(shapes, packed, clip_len, interval):
    form = replace(CLIPS, clip_len=clip_len, frame_interval=interval)
    files = Samples(scan(shapes, True, False), form, 0)
    assert_same(batches(PackedSamples(open_pack(packed, False), form, 0)), batches(files))


def test_an_image_pack_gives_the_batches_that_the_files_give(tmp_path):
    source = make_images(tmp_path / "images")
    files = Samples(scan(source, False, False), IMAGES, 0)
    pack = make_pack(source, tmp_path / "pack", video=False)
    assert_same(batches(PackedSamples(pack, IMAGES, 0)), batches(files))
    assert batches(files)[0]["x"].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("chunk", [1, 5, 32])
def test_items_of_a_shard_follow_one_another_whatever_the_chunks(shapes, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("data.packs.format.MIN_SHARDS", 3)
    monkeypatch.setattr("data.packs.writer.CHUNK_FRAMES", chunk)
    pack = make_pack(shapes, tmp_path / "pack")
    assert pack.shards.tolist() == [0] * 6 + [1] * 6 + [2] * 4
    files = Samples(scan(shapes, True, False), CLIPS, 0)
    assert_same(batches(PackedSamples(pack, CLIPS, 0)), batches(files))


def test_a_pack_of_real_clips_gives_the_batches_that_the_files_give(real_clips, tmp_path):
    form = replace(CLIPS, image_size=64)
    pack = make_pack(real_clips, tmp_path / "pack", image_size=64)
    files = Samples(scan(real_clips, True, False), form, 0)
    assert_same(batches(PackedSamples(pack, form, 0)), batches(files))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_of_a_pack_do_not_depend_on_the_number_of_workers(packed, num_workers):
    samples = PackedSamples(open_pack(packed, False), CLIPS, 0)
    assert_same(batches(samples, num_workers), batches(samples))


def test_the_ranks_share_the_batches_of_a_pack(packed):
    samples = PackedSamples(open_pack(packed, False), CLIPS, 0)
    parts = [batches(samples, rank=rank, ranks=2) for rank in range(2)]
    for whole, first, second in zip(batches(samples), *parts, strict=True):
        assert torch.equal(whole["x"], torch.cat([first["x"], second["x"]]))


def test_a_sample_does_not_depend_on_the_others_of_its_batch(packed):
    samples = PackedSamples(open_pack(packed, False), CLIPS, 0)
    keys = [(0, 3), (2, 1)]
    batch = samples.__getitems__(keys)
    assert all(torch.equal(samples.__getitems__([key])["x"][0], x) for key, x in zip(keys, batch["x"], strict=True))


def test_a_pack_goes_to_another_process_with_its_shards_open(packed):
    pack = open_pack(packed, False)
    frames = item_frames(pack, 5)
    other = pickle.loads(pickle.dumps(pack))
    assert len(pickle.dumps(pack)) < 20_000
    assert np.array_equal(item_frames(other, 5), frames)


def test_latents_are_of_the_frames_and_of_their_mirrored_copies(shapes, tmp_path):
    pixels = make_pack(shapes, tmp_path / "pixels", image_size=32)
    latents = make_pack(shapes, tmp_path / "latents", image_size=32, vae=BlockMeans)
    assert latents.settings.vae == {
        "name": "mean", "fingerprint": "block means", "scale": 0.5, "channels": 4, "side": 4
    }  # fmt: skip
    for index in range(len(pixels)):
        frames, encoded, mirrored = (
            item_frames(pixels, index),
            item_frames(latents, index),
            item_frames(latents, index, True),
        )
        assert (encoded.shape, encoded.dtype) == ((16, 2, 4, 4, 4), np.float16)
        assert np.array_equal(encoded, BlockMeans.encode_moments(frames))
        assert np.array_equal(mirrored, BlockMeans.encode_moments(frames[:, :, ::-1]))


def test_samples_of_latents_have_the_windows_and_flips_of_the_pixels(shapes, tmp_path):
    form = replace(CLIPS, image_size=32)
    pixels = PackedSamples(make_pack(shapes, tmp_path / "pixels", image_size=32), form, 0)
    latents = PackedSamples(make_pack(shapes, tmp_path / "latents", image_size=32, vae=BlockMeans), form, 0)
    for ours, theirs in zip(batches(latents), batches(pixels), strict=True):
        assert (ours["x"].shape, ours["x"].dtype) == ((4, 2, 4, 4, 4, 4), torch.float16)
        for x, clip in zip(ours["x"], theirs["x"], strict=True):
            moments = BlockMeans.encode_moments(clip.permute(1, 2, 3, 0).numpy())  # (T, 2, C, h, w)
            assert np.array_equal(x.numpy(), moments.transpose(1, 2, 0, 3, 4))


@pytest.mark.parametrize("vae", [None, BlockMeans])
def test_the_network_sees_a_pack_in_one_layout(shapes, tmp_path, vae):
    pack = make_pack(shapes, tmp_path / "pack", image_size=32, vae=vae)
    source = Source(replace(CLIPS, image_size=32), pack.found(), pack, pack.settings.space, None)
    samples = source.dataset(seed=0)
    stream = EpochStream(len(samples), 4, 12, seed=3, first=0, rank=0, ranks=1)
    batch = next(iter(make_loader(samples, stream, 0, pin_memory=False)))
    x = source.to_input(batch, torch.Generator(), 0, 0, 0)
    assert x.shape == ((4, 4, 4, 4, 4) if vae else (4, 3, 4, 32, 32))
    assert x.is_contiguous()


def test_samples_of_image_latents_have_no_time(tmp_path):
    source = make_images(tmp_path / "images")
    pack = make_pack(source, tmp_path / "pack", video=False, image_size=16, vae=BlockMeans)
    batch = batches(PackedSamples(pack, IMAGES, 0))[0]
    assert batch["x"].shape == (4, 2, 4, 2, 2)
    assert not batch["seconds_per_frame"].any()


def test_a_pack_has_what_the_scan_finds(tmp_path):
    source = tmp_path / "train"
    for name, count, rate in (("A/long.mp4", 12, 30), ("A/short.mp4", 3, 10), ("B/other.mp4", 7, 25)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(source / name, np.zeros((count, 16, 16, 3), np.uint8), rate)
    ours, theirs = make_pack(source, tmp_path / "pack").found(), scan(source, True, False)
    assert (ours.classes, ours.unreadable) == (theirs.classes, theirs.unreadable)
    assert [(item.path, item.label) for item in ours] == [(item.path, item.label) for item in theirs]
    assert [len(item.video.times) for item in ours] == [12, 3, 7]
    assert ours.mean_frame_rate() == theirs.mean_frame_rate()
    assert ours.shorter_than(10) == 2


def test_the_listing_of_a_pack_says_what_it_holds(packed, shapes):
    result = run_script("check_data.py", packed, cwd=packed)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    size = 16 * 16 * 16 * 16 * 3
    assert lines[0] == f"a pack of 16×16 pixels: 256 frames, {size:,} bytes in 16 shards, made from {shapes}"
    assert lines[1] == f"{packed}: 16 clips of 4 classes"
    assert lines[2:] == [
        *(f"  {name}: 4" for name in ("CircleRight", "CircleUp", "SquareRight", "SquareUp")),
        "frames a second: 25 (16 clips)",
        "frames a clip: 16 to 16, median 16",
        "unreadable files: 0",
    ]


def flip_a_byte(path: Path, keep_time: bool = False) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 12,287 bytes, not the 12,288"),
        (flip_a_byte, "has changed"),
    ],
    ids=["missing", "truncated", "changed"],
)
def test_a_damaged_shard_is_named_and_mended_alone(copied, shapes, damage, words):
    whole = {path.name: path.read_bytes() for path in copied.glob("*.bin")}
    before = {path.name: path.stat().st_mtime_ns for path in copied.glob("*.bin")}
    damage(shard_path(copied, 5))
    with pytest.raises(UserError, match=rf"shard-00005\.bin {words}.*prepare\.py {shapes} .*--video --image-size 16"):
        open_pack(copied, False)
    make_pack(shapes, copied)
    assert {path.name: path.read_bytes() for path in copied.glob("*.bin")} == whole
    after = {path.name: path.stat().st_mtime_ns for path in copied.glob("*.bin")}
    assert [name for name in after if after[name] != before[name]] == ["shard-00005.bin"]


def test_a_byte_that_changes_under_the_old_time_is_found_and_mended_by_packing_again(copied, shapes):
    whole = shard_path(copied, 2).read_bytes()
    flip_a_byte(shard_path(copied, 2), keep_time=True)
    make_pack(shapes, copied)
    assert shard_path(copied, 2).read_bytes() == whole


def test_a_pack_with_other_times_is_a_good_pack_by_its_checksums(copied):
    for path in copied.glob("*.bin"):
        os.utime(path, ns=(1, 1))
    assert len(open_pack(copied, False)) == 16


def test_a_pack_with_the_recorded_times_is_opened_without_reading_it(copied, monkeypatch):
    monkeypatch.setattr("data.packs.pack.file_checksum", None)
    open_pack(copied, False)


def test_a_half_made_pack_is_refused_with_the_command_that_finishes_it(copied, shapes):
    (copied / "index.json").unlink()
    for opened in (is_pack, open_pack):
        with pytest.raises(UserError, match=f"half-made pack: run python EqM/prepare.py {shapes} {copied} --video"):
            opened(copied)
    result = run_script("check_data.py", copied, cwd=copied)
    assert result.returncode == 1
    assert "half-made pack" in result.stderr
    assert len(result.stderr.splitlines()) == 1


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[:50],
    "a list": lambda text: "[]",
    "nested": lambda text: "[" * 100_000,
    "no keys": lambda text: "{}",
    "more keys": lambda text: json.dumps(json.loads(text) | {"more": 1}),
    "fewer keys": lambda text: json.dumps(dict(list(json.loads(text).items())[:3])),
    "other types": lambda text: json.dumps({key: [] for key in json.loads(text)}),
    "a bit": lambda text: text.replace("16", "17", 1),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_index_is_refused_and_mended(copied, shapes, how):
    path = copied / "index.json"
    path.write_text(DAMAGE[how](path.read_text()))
    with pytest.raises(UserError, match="index.json is damaged or may not be read: run python EqM/prepare.py"):
        open_pack(copied, False)
    assert len(make_pack(shapes, copied)) == 16


def test_an_index_with_other_labels_lengths_or_shards_is_refused(copied):
    index = json.loads((copied / "index.json").read_text())
    for name, column in index["items"].items():
        for other in (column[:-1], column[::-1] if len(set(column)) > 1 else [99, *column[1:]]):
            changed = index | {"items": index["items"] | {name: other}}
            (copied / "index.json").write_text(json.dumps(changed))
            with pytest.raises(UserError, match="index.json is damaged"):
                open_pack(copied, False)


def change_items(name: str, value: object, place: int = 3) -> Callable[[dict], None]:
    """Changes one number of an index."""
    return lambda index: index["items"][name].__setitem__(place, value)


WRONG = {
    "offset beyond the shard": change_items("offset", 10**9),
    "offset below 0": change_items("offset", -12288),
    "offset of another frame": change_items("offset", 768),
    "label beyond the classes": change_items("label", 4),
    "label below 0": change_items("label", -1),
    "label as text": change_items("label", "1"),
    "label as a fraction": change_items("label", 1.5),
    "no frames": change_items("frames", 0),
    "more frames than the shard": change_items("frames", 17),
    "frames beyond an int": change_items("frames", 2**70),
    "frames that overflow": change_items("frames", 2**63 - 1),
    "a shard beyond the last": change_items("shard", 16, 15),
    "a shard twice": change_items("shard", 2),
    "no rate": change_items("frames_per_second", 0.0),
    "a rate that is no number": change_items("frames_per_second", float("nan")),
    "a rate without end": change_items("frames_per_second", float("inf")),
    "a path as a number": change_items("path", 7),
    "a path that cannot be a name": change_items("path", "\ud800"),
    "a column less": lambda index: index["items"].pop("label"),
    "a shorter column": lambda index: index["items"]["label"].pop(),
    "a column of lists": lambda index: index["items"].update(label=[[0]] * 16),
    "no items": lambda index: index["items"].update({name: [] for name in index["items"]}),
    "items as a list": lambda index: index.update(items=[]),
    "no shards": lambda index: index.update(shards=[]),
    "a shard's size as text": lambda index: index["shards"][3].update(bytes="12288"),
    "another size of a shard": lambda index: index["shards"][3].update(bytes=12287),
    "a time as text": lambda index: index["shards"][3].update(mtime_ns="now"),
    "unreadable files as text": lambda index: index.update(unreadable="none"),
    "unreadable files without reasons": lambda index: index.update(unreadable=[["a.avi"]]),
}


@pytest.mark.parametrize("how", WRONG)
def test_an_index_with_a_right_checksum_and_wrong_numbers_is_refused_and_mended(copied, shapes, how):
    whole = read_json(copied / "index.json")
    index = json.loads(json.dumps(whole))
    WRONG[how](index)
    write_json(copied / "index.json", index)
    with pytest.raises(UserError, match="index.json is damaged or may not be read: run python EqM/prepare.py"):
        read_pack(copied)
    make_pack(shapes, copied)
    assert read_json(copied / "index.json") == whole


@pytest.mark.parametrize("how", ["label beyond the classes", "offset of another frame", "a shorter column"])
def test_a_record_with_a_right_checksum_and_wrong_numbers_does_not_count(copied, shapes, how):
    whole, path = read_json(copied / "index.json"), copied / "shard-00003.json"
    record = read_json(path)
    if how == "a shorter column":
        record["items"]["label"] = []
    else:
        name, value = ("label", 4) if how.startswith("label") else ("offset", 768)
        record["items"][name] = [value]
    write_json(path, record)
    made = make_pack(shapes, copied)
    assert made.labels.tolist() == whole["items"]["label"]


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": "16"}, {"image_size": 0}, {"image_size": 2**40}, {"image_size": True}, {"files": -1},
        {"files": 10**30}, {"classes": []}, {"classes": [1, 2]}, {"classes": ["A", "A"]}, {"classes": "AB"},
        {"values": "words"}, {"values": "latents"}, {"vae": []}, {"vae": {"name": "ema"}}, {"video": 1}, {"source": 5},
        {"names_crc32": "1"},
        {"values": "latents", "vae": {"name": "a", "fingerprint": "b", "scale": 0.0, "channels": 4, "side": 2}},
        {"values": "latents", "vae": {"name": "a", "fingerprint": "b", "scale": 0.5, "channels": 4, "side": 99}},
    ],
    ids=str,
)  # fmt: skip
def test_settings_with_a_right_checksum_and_wrong_values_are_refused(copied, change):
    write_json(copied / "settings.json", read_json(copied / "settings.json") | change)
    with pytest.raises(UserError, match=r"settings.json is missing, damaged"):
        read_pack(copied)


@pytest.mark.parametrize("name", ["settings.json", "index.json", "shard-00003.bin", "shard-00003.json"])
def test_a_pipe_in_place_of_a_file_is_never_waited_for(copied, shapes, name):
    (copied / name).unlink()
    os.mkfifo(copied / name)
    if name != "shard-00003.json":  # which training does not read
        with pytest.raises(UserError, match=name):
            open_pack(copied, False)
    if name != "settings.json":
        assert len(make_pack(shapes, copied)) == 16


def test_the_index_of_another_pack_is_refused(copied, shapes, tmp_path):
    make_pack(shapes, tmp_path / "larger", image_size=24)
    shutil.copy(tmp_path / "larger" / "index.json", copied)
    with pytest.raises(UserError, match="index.json is damaged"):
        open_pack(copied, False)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_settings_are_refused_and_no_folder_is_to_be_deleted(copied, shapes, how):
    path = copied / "settings.json"
    path.write_text(DAMAGE[how](path.read_text()))
    for use in (is_pack, lambda folder: open_pack(folder, False), lambda folder: make_pack(shapes, folder)):
        with pytest.raises(
            UserError, match="settings.json is missing, damaged .*: make the pack again, in a new"
        ) as got:
            use(copied)
        assert "delete" not in str(got.value)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_shard_whose_record_is_damaged_is_made_anew(copied, shapes, how):
    whole = (copied / "shard-00003.json").read_text()
    (copied / "shard-00003.json").write_text(DAMAGE[how](whole))
    before = {path.name: path.stat().st_mtime_ns for path in copied.glob("*.bin")}
    assert len(make_pack(shapes, copied)) == 16
    after = {path.name: path.stat().st_mtime_ns for path in copied.glob("*.bin")}
    assert [name for name in after if after[name] != before[name]] == ["shard-00003.bin"]
    assert json.loads((copied / "shard-00003.json").read_text())["items"] == json.loads(whole)["items"]


WITHOUT_PRIVILEGES = """
import ctypes, runpy, sys
header, capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capget(header, capabilities) == 0
for kind in (0, 1):  # in effect, and permitted, which access() goes by
    capabilities[kind] &= ~0b110  # the two by which permissions are passed over
assert ctypes.CDLL(None).capset(header, capabilities) == 0
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_privileges(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a script for whom permissions count, which for root they do not."""
    (cwd / "without_privileges.py").write_text(WITHOUT_PRIVILEGES)
    return run_script(cwd / "without_privileges.py", ROOT / "EqM" / script, *arguments, cwd=cwd)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("settings.json", "settings.json is missing, damaged or may not be read: make the pack again, in a new folder"),
        ("index.json", "index.json is damaged or may not be read: run python"),
        ("shard-00004.bin", "shard-00004.bin cannot be read (Permission denied): run python"),
    ],
)
def test_a_file_that_may_not_be_read_is_one_line(copied, shapes, tmp_path, name, words):
    (copied / name).chmod(0)
    result = without_privileges("check_data.py", copied, cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()[-1:]
    assert words in line
    assert "Traceback" not in result.stderr
    if name != "settings.json":
        options = ("--video", "--image-size", 16)
        result = without_privileges("prepare.py", shapes, copied, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert len(open_pack(copied, False)) == 16


def test_a_pack_of_another_version_is_refused(copied):
    settings = json.loads((copied / "settings.json").read_text())
    (copied / "settings.json").write_text(json.dumps(settings | {"version": 1}))
    with pytest.raises(UserError, match="of version 1, and this is version 2: make it again, in a new folder"):
        open_pack(copied, False)


@pytest.mark.parametrize("name", ["index.json", "settings.json"])
@pytest.mark.parametrize("content", ['{"format": "of mine", "version": 1}', "[]", "no JSON", '{"a": 1}'])
def test_data_with_a_file_of_a_packs_name_is_plain_data(shapes, tmp_path, name, content):
    source = Path(shutil.copytree(shapes, tmp_path / "data"))
    (source / name).write_text(content)
    assert not is_pack(source)
    with pytest.raises(UserError, match="is not a pack"):
        read_pack(source)
    before = sorted(source.rglob("*"))
    with pytest.raises(UserError, match="data holds something else than a pack: give another folder"):
        make_pack(shapes, source)
    assert sorted(source.rglob("*")) == before


def test_data_with_files_of_a_packs_names_is_listed_as_plain_data(shapes, tmp_path):
    source = Path(shutil.copytree(shapes, tmp_path / "data"))
    for name in ("index.json", "settings.json"):
        (source / name).write_text('{"format": "of mine", "version": 1}')
    result = run_script("check_data.py", source, "--video", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "16 clips of 4 classes" in result.stdout


def test_the_suggested_command_can_be_pasted(shapes, tmp_path):
    source = Path(shutil.copytree(shapes, tmp_path / "my clips; $(all)"))
    folder = tmp_path / "it's a pack"
    make_pack(source, folder)
    (folder / "index.json").unlink()
    with pytest.raises(UserError) as got:
        open_pack(folder, False)
    command = str(got.value).partition("run ")[2].rpartition(" again to finish it")[0]
    words = ["python", "EqM/prepare.py", str(source), str(folder), "--video", "--image-size", "16"]
    assert shlex.split(command) == words


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5432])
def test_a_checksum_is_over_the_whole_file_whatever_is_read_at_a_time(tmp_path, monkeypatch, size):
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr("runtime.files.READ_BYTES", 1000)
    assert file_checksum(tmp_path / "file") == zlib.crc32(data)


@pytest.mark.parametrize("place", [0, 5_000, 12_287])
def test_a_changed_byte_is_found_in_every_part_of_a_shard(copied, monkeypatch, place):
    monkeypatch.setattr("runtime.files.READ_BYTES", 5_000)
    path = shard_path(copied, 7)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="shard-00007.bin has changed"):
        open_pack(copied, False)


def test_another_folder_is_no_pack(shapes):
    assert not is_pack(shapes)
    with pytest.raises(UserError, match="is not a pack"):
        open_pack(shapes, False)


def test_a_system_that_does_not_let_a_process_copy_its_memory_reads_the_same(packed, monkeypatch):
    def refuse(*arguments: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    expected = [item_frames(open_pack(packed, False), i) for i in range(16)]
    for call in (None, refuse):
        monkeypatch.setattr("data.packs.shards._copy", call)
        pack = open_pack(packed, False)
        assert all(np.array_equal(item_frames(pack, i), expected[i]) for i in range(16))


@pytest.mark.parametrize("fast", [True, False])
def test_a_shard_that_is_cut_or_gone_or_another_is_named(copied, monkeypatch, fast):
    if not fast:
        monkeypatch.setattr("data.packs.shards._copy", None)
    monkeypatch.setattr("data.packs.shards.CHECK_S", 0)
    samples = PackedSamples(open_pack(copied, False), CLIPS, 0)
    for number, (damage, problem) in enumerate(
        [
            (lambda path: os.truncate(path, 5000), "has 5,000 bytes, not the 12,288 that it had"),
            (lambda path: path.write_bytes(bytes(12_288)), "has changed since the run began"),
            (lambda path: (path.unlink(), path.write_bytes(bytes(12_288))), "has changed since the run began"),
            (Path.unlink, "cannot be read (No such file or directory)"),
            (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read (it is a folder, a pipe or a device"),
        ]
    ):
        place, gone = [(0, number)], number > 1  # what is open stays whole when its name is gone
        whole = samples.__getitems__(place)["x"]
        damage(shard_path(copied, number))
        if gone:
            assert torch.equal(samples.__getitems__(place)["x"], whole)
            samples.shards.opened.cache_clear()
        assert f"shard-{number:05d}.bin {problem}" in samples.__getitems__(place)["problem"]


def test_a_shard_with_another_time_and_the_same_bytes_is_read_on(copied, monkeypatch):
    monkeypatch.setattr("data.packs.shards.CHECK_S", 0)
    samples = PackedSamples(open_pack(copied, False), CLIPS, 0)
    whole = samples.__getitems__([(0, 2)])["x"]
    shard_path(copied, 2).write_bytes(shard_path(copied, 2).read_bytes())
    assert torch.equal(samples.__getitems__([(0, 2)])["x"], whole)


def test_more_shards_than_may_be_open_are_read(packed, monkeypatch):
    samples = PackedSamples(open_pack(packed, False), CLIPS, 0)
    keys = [(0, i) for i in range(16)]
    expected = samples.__getitems__(keys)["x"]
    monkeypatch.setattr("data.packs.shards.MAX_OPEN", 3)
    other = PackedSamples(read_pack(packed), CLIPS, 0)
    assert torch.equal(other.__getitems__(keys)["x"], expected)
    assert other.shards.opened.cache_info().currsize == 3
