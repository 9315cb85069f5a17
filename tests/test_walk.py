"""Which files of a folder are taken, which classes they have, and what is said of the others."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from check_data import summary
from conftest import make_pack, run_script
from data.batches import UnreadableLog
from data.clips import Samples, read_sample
from data.form import Form
from data.packs.plan import plan_pack
from data.scan import find_loose_files, scan
from data.walk import in_order
from runtime.errors import UserError

# A container, and a codec that it holds, for each ending of a video. Those of ".ogv" and ".webm" are of VP8.
VIDEOS = {
    ".avi": ("avi", "mpeg4"),
    ".divx": ("avi", "mpeg4"),
    ".mp4": ("mp4", "mpeg4"),
    ".m4v": ("mp4", "mpeg4"),
    ".mov": ("mov", "mpeg4"),
    ".qt": ("mov", "mpeg4"),
    ".3gp": ("3gp", "mpeg4"),
    ".3g2": ("3g2", "mpeg4"),
    ".f4v": ("f4v", "libx264"),
    ".mkv": ("matroska", "mpeg4"),
    ".webm": ("webm", "libvpx"),
    ".wmv": ("asf", "wmv2"),
    ".asf": ("asf", "msmpeg4"),
    ".flv": ("flv", "flv"),
    ".mpg": ("mpeg", "mpeg1video"),
    ".mpeg": ("mpeg", "mpeg2video"),
    ".vob": ("vob", "mpeg2video"),
    ".ts": ("mpegts", "mpeg2video"),
    ".mts": ("mpegts", "libx264"),
    ".m2ts": ("mpegts", "mpeg2video"),
    ".ogv": ("ogg", "libvpx"),
    ".gif": ("gif", "gif"),
}
IMAGES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".ppm", ".pnm"), "PPM"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF", ".avif": "AVIF"},
}
UCF = ("v_Dive_g01_c01.avi", "v_Dive_g08_c01.avi", "v_Swing_g02_c01.avi", "v_Swing_g09_c01.avi")
TRAIN_LIST = "Dive/v_Dive_g08_c01.avi 1\r\nSwing/v_Swing_g09_c01.avi 2\r\nSwing/v_Swing_g10_c01.avi 2\r\n"
TEST_LIST = "Dive/v_Dive_g01_c01.avi\nSwing/v_Swing_g02_c01.avi\n"


def write_clip(path: Path, container: str = "avi", codec: str = "mpeg4", frames: int = 6) -> None:
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for i in range(frames):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 30 * i % 256, np.uint8), "rgb24")))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def samples_of_kinds(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a clip and of an image."""
    folder = tmp_path_factory.mktemp("kinds")
    write_clip(folder / "a.avi")
    Image.new("RGB", (8, 8), (200, 100, 0)).save(folder / "a.png")
    return {ending: (folder / f"a{ending}").read_bytes() for ending in (".avi", ".png")}


@pytest.fixture
def put(tmp_path, samples_of_kinds) -> Callable[..., Path]:
    """Writes files into a new folder `data`, by their names below it: clips, images, or the text that is given."""

    def write(*names: str, **texts: str) -> Path:
        for name in (*names, *texts):
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(texts[name].encode() if name in texts else samples_of_kinds.get(path.suffix, b"?"))
        return tmp_path / "data"

    return write


def listing(folder: Path, video: bool = False) -> list[str]:
    """What check_data.py prints, or the error."""
    try:
        return list(summary(scan(folder, video, show_progress=False), video))
    except UserError as error:
        return [f"error: {error}"]


def classes(folder: Path, video: bool = False) -> dict[str, int]:
    found = scan(folder, video, show_progress=False)
    return dict(zip(found.classes, found.count_by_class(), strict=True))


@pytest.mark.parametrize("video", [True, False])
def test_what_the_readers_open_is_taken_whatever_its_ending(tmp_path, video):
    for ending, kind in (VIDEOS if video else IMAGES).items():
        path = tmp_path / ending[1:] / f"a{ending.upper()}"
        path.parent.mkdir()
        if video:
            write_clip(path, *kind)
        else:
            Image.new("RGB", (8, 8), (200, 100, 0)).save(path, format=kind)
    found = scan(tmp_path, video, show_progress=False)
    assert (len(found.classes), found.unreadable) == (len(VIDEOS if video else IMAGES), ())
    for item in found:
        assert not video or len(item.video.times) == 6
        x, _ = read_sample(item, Form(video, 16, 4 if video else 1, 1), 0.9)
        assert x.shape == ((3, 4, 16, 16) if video else (3, 16, 16))


def test_hidden_files_and_folders_are_no_samples_and_no_classes(put):
    folder = put("cat/0.png", "dog/1.png", ".ipynb_checkpoints/0-checkpoint.png", "cat/.ipynb_checkpoints/0.png")
    put("__MACOSX/cat/._0.png", "dog/._1.png", "dog/__MACOSX/x.png", "cat/.DS_Store")
    assert classes(folder) == {"cat": 1, "dog": 1}
    assert [name for _, name in find_loose_files(folder, video=False)] == ["cat", "dog"]
    (line,) = [line for line in listing(folder) if "left out" in line]
    assert line.startswith("left out: 6 hidden (such as ")


def link(place: Path, target: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "links",
    [
        {"cat/up": ".."},
        {"cat/x": "../dog", "dog/y": "../cat", "cat/z": "../../data"},
        {"aaa": "cat", "cat/all": "../dog"},
        {"cat/outside": "../.."},  # which holds this folder, and others
        {"cat/again.png": "0.png", "cat/00.png": "../dog/1.png"},
        {"cat/far.png": "../../other/0.png", "dog/far.png": "../../other/0.png"},
    ],
    ids=["to the root", "in a circle", "to a class", "to above the root", "to files", "twice to a file elsewhere"],
)
def test_what_several_links_lead_to_is_counted_once(put, links):
    folder = put("cat/0.png", "dog/1.png", "../other/0.png")
    for place, target in links.items():
        link(folder / place, target)
    elsewhere = "cat/far.png" in links
    assert classes(folder) == {"cat": 1 + elsewhere, "dog": 1}
    (line,) = [line for line in listing(folder) if "left out" in line]
    assert f"{len(links) - elsewhere} links to what is counted already" in line


def test_a_folder_of_many_links_is_put_in_order_once(put, monkeypatch):
    names = [f"{i:03}.png" for i in range(100)]
    folder, sorted_lists = put("cat/0.png", *(f"../other/{name}" for name in names)), []
    for name in names:
        link(folder / "cat" / name, f"../../other/{name}")
    monkeypatch.setattr("data.walk.in_order", lambda names: sorted_lists.append(names) or in_order(names))
    found = [Path(path).name for path, _ in find_loose_files(folder, video=False)]
    assert found == sorted(["0.png", *names])
    # Once when a folder is found, and once with its links.
    assert len(sorted_lists) == len(["data", "cat", "cat with links"])


def test_a_link_to_a_class_folder_elsewhere_is_followed_once(put):
    folder = put("cat/0.png", "../store/dogs/1.png", "../store/dogs/2.png")
    link(folder / "dog", "../store/dogs")
    link(folder / "wolf", "../store/dogs")
    assert classes(folder) == {"cat": 1, "dog": 2}


CLASS_FOLDERS = {
    "splits in other cases": (["Train/a/0.png", "TEST/a/0.png"], ["error: ", "holds splits"]),
    "a folder too high": (
        ["mydata/a/0.png", "mydata/b/0.png"],
        ["error: ", "holds one class, mydata", "give ", "mydata"],
    ),
    "two folders too high": (
        ["x/mydata/a/0.png", "x/mydata/b/0.png"],
        ["error: ", f"give {{}}{os.sep}x{os.sep}mydata"],
    ),
    "one class in numbered parts": (["all/000/0.png", "all/001/0.png"], ["2 images of 1", "looks like a mistake: all"]),
    "years above the classes": (
        ["2019/a/0.png", "2019/b/0.png", "2020/a/0.png", "2020/b/0.png"],
        ["4 images of 2 classes", "looks like a mistake: all class folders hold the same folders, such as a"],
    ),
    "splits among classes": (["train/0.png", "test/0.png", "cat/0.png"], ["looks like a mistake: test, train are"]),
    "folders without images": (
        ["cat/0.png", "dog/1.png", "notes/a.txt"],
        ["of 2 classes", "mistake: folders without any", "classes: notes"],
    ),
    "a class that cannot be read": (
        [*(f"cat/{i}.png" for i in range(20)), "bird/broken.jpg", "dog/0.png"],
        ["21 images of 2 classes", "looks like a mistake: no readable file in bird"],
    ),
    "other files": (
        ["cat/0.png", "cat/a.txt", "dog/0.png", "dog/b.txt", "dog/b.heic", "c.json", "dog/name"],
        ["left out: 2 .txt (in cat, dog), 1 ", "and 1 other kinds"],
    ),
    "videos among images": (["cat/0.png", "cat/a.avi", "dog/1.png"], ["mistake: 1 videos are left out: add --video"]),
    "frames of videos": (
        ["a.mp4/0.png", "a.mp4/1.png", "b.mp4/0.png"],
        ["mistake: the classes a.mp4, b.mp4", "ffmpeg"],
    ),
    "images without class folders": (
        ["0.png", "1.png"],
        ["error: ", "no class folders", "2 images", f"{{}}{os.sep}ClassName"],
    ),
    "images beside class folders": (["cat/0.png", "dog/0.png", "x.png"], ["left out: 1 files in no class folder"]),
}


@pytest.mark.parametrize(("names", "words"), CLASS_FOLDERS.values(), ids=CLASS_FOLDERS.keys())
def test_class_folders_that_may_be_a_mistake_are_named(put, names, words):
    folder = put(*names)
    text = "\n".join(listing(folder))
    for word in words:
        assert word.format(folder) in text
    assert ("error" in text) == ("error: " in words)
    assert len(text.splitlines()) < 10


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("place", ["../", "", "../ucfTrainTestlist/"])
def test_a_list_of_ucf_101_keeps_training_from_test_videos(put, flat, place):
    folder = put(*(name if flat else f"{name.split('_')[1]}/{name}" for name in UCF))
    put(
        **{f"{place}trainlist01.txt": TRAIN_LIST, f"{place}testlist01.txt": TEST_LIST, f"{place}classInd.txt": "1 Dive"}
    )
    found = scan(folder, video=True, show_progress=False)
    assert found.classes == ("Dive", "Swing")
    assert {Path(item.path).name for item in found} == {UCF[1], UCF[3]}
    assert any(line.startswith("left out: 2 of 4 videos, which ") for line in listing(folder, video=True))
    folder.rename(folder.with_name("test"))
    if place.startswith("../"):
        found = scan(folder.with_name("test"), video=True, show_progress=False)
        assert {Path(item.path).name for item in found} == {UCF[0], UCF[2]}


def test_a_list_of_ucf_101_that_names_no_file_of_the_folder_is_passed_over(put):
    folder = put("Dive/v_Dive_g30_c01.avi", "Swing/v_Swing_g30_c01.avi", **{"../trainlist01.txt": TRAIN_LIST})
    assert classes(folder, video=True) == {"Dive": 1, "Swing": 1}
    assert not any("trainlist" in line for line in listing(folder, video=True))


TABLES = {
    "names without endings": (
        "video_name,tag\na,x\nb 2,y\n",
        ["(columns video_name,tag): none of its rows (2)", "/a,", "ending"],
    ),
    "semicolons": ("video_name;tag\na.avi;x\n", ["has 'video_name;tag': separate them by commas, not by semicolons"]),
    "other columns": ("file,kind\na.avi,x\n", ["needs the columns video_name,tag", "has 'file,kind'"]),
    "files elsewhere": (
        "video_name,tag\ngone/c.avi,x\n",
        ["none of its rows (1)", "data/gone/c.avi, and there is", "a.avi"],
    ),
    "a path out of the folder": (
        "video_name,tag\na.avi,x\n../other/a.avi,y\n",
        ["row 2 names ../other/a.avi, with '..'"],
    ),
    "a name of 5,000 letters": (f"video_name,tag\n{'n' * 5000}.avi,x\n", ["none of its rows (1)", "nnn…"]),
}


@pytest.mark.parametrize(("text", "words"), TABLES.values(), ids=TABLES.keys())
def test_a_table_that_cannot_be_meant_is_named_with_what_it_holds(put, text, words):
    folder = put("a.avi", "b 2.avi", "../other/a.avi", **{"../train.csv": text})
    folder = folder.rename(folder.with_name("train"))
    (line,) = listing(folder, video=True)
    assert line.startswith(f"error: {folder.parent / 'train.csv'}")
    for word in words:
        assert word.replace("data/", "train/") in line
    assert len(line) < 700


def test_a_file_that_a_table_lists_twice_is_said(put):
    rows = "video_name,tag\na.avi,x\nb.avi,y\na.avi,y\nb.avi,y\n"
    folder = put("a.avi", "b.avi", "c.avi", **{"data.csv": rows})
    (line,) = [line for line in listing(folder, video=True) if "more than once" in line]
    assert "2 files" in line
    assert "a.avi as x and as y" in line
    assert [line for line in listing(folder, video=True) if line.startswith("left out")] == [
        f"left out: 1 videos that {folder / 'data.csv'} does not list"
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["clip1/0001.png", "clip1/0002.png"], ["no videos", "2 images", "join frames to videos", "ffmpeg"]),
        (["holiday.avi"], ["holiday.avi has no class", "ClassName", "data.csv (columns video_name,tag)"]),
        (["cat/a.rm", "cat/b.mxf"], ["no videos", "left out: 1 .mxf (in cat), 1 .rm (in cat)"]),
    ],
    ids=["frames", "flat", "unknown containers"],
)
def test_folders_without_videos_or_classes_say_what_to_do(put, names, words):
    (line,) = listing(put(*names), video=True)
    for word in words:
        assert word in line


def test_packing_says_what_it_leaves_out(put, tmp_path, capsys):
    plan_pack(put("cat/0.png", "cat/a.txt", "dog/.x"), tmp_path / "pack", Form(False, 16), None)
    assert "left out: 1 .txt (in cat); 1 hidden" in capsys.readouterr().out


def test_a_pack_has_the_classes_of_its_folder(put, tmp_path):
    folder = put(*(f"cat/{i}.png" for i in range(20)), "bird/broken.jpg", "dog/0.png")
    pack = make_pack(folder, tmp_path / "pack", video=False, image_size=8)
    ours, theirs = pack.found(), scan(folder, False, show_progress=False)
    assert ours.classes == theirs.classes == ("cat", "dog")
    assert [item.label for item in ours] == [item.label for item in theirs]


def test_a_name_of_many_lines_is_one_file_and_one_line(put):
    name = "a" + 25 * "\n" + "\x1b[2Jb.png"
    folder = put("cat/0.png", f"cat/{name}")
    found = scan(folder, video=False, show_progress=False)
    index = [Path(path).name for path in found.paths].index(name)
    (folder / "cat" / name).write_bytes(b"gone bad")
    log = UnreadableLog(found)
    log.add([Samples(found, Form(False, 16), seed=0)[0, index]["unreadable"]])  # does not end the run
    assert [path for path, _ in log.exchange()] == [str(folder / "cat" / name)]
    text = "\n".join(listing(folder))
    assert "unreadable files: 1" in text
    assert r"\n\x1b[2Jb.png" in text


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def make_damaged(folder: Path, count: int) -> None:
    """Twelve whole files, and a few more of each kind whose headers are whole."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for i in range(12 + count):
        for ending in (".jpg", ".bmp", ".tif"):
            path = folder / ending[1:] / f"{i}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(path)
            if i >= 12:
                cut(path, 0.7)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_decoding_all_finds_damage_behind_headers_and_fails_where_training_would(tmp_path, count):
    make_damaged(tmp_path / "data", count)
    result = run_script("check_data.py", "data", "--decode", cwd=tmp_path)
    assert result.returncode == (1 if count == 3 else 0), result.stderr
    assert f"unreadable files: {3 * count}" in result.stdout
    for ending in (".jpg", ".bmp", ".tif") if count else ():
        assert f"data/{ending[1:]}/12{ending}: " in result.stdout
    assert f"decoding files: 100%|██████████| {36 + 3 * count}/{36 + 3 * count}" in result.stderr
    assert ("check_data.py: error: 9 of 45 files in data cannot be read" in result.stderr) == (count == 3)


@pytest.mark.parametrize(
    ("kind", "said"),
    [(("mp4", "mpeg4"), r"after \d+ of 40 frames: Invalid data"), (("mpegts", "libx264"), r"only \d+ of \d+ frames")],
)
def test_decoding_all_reads_videos_to_their_end(tmp_path, kind, said):
    (tmp_path / "a").mkdir()
    for name in ("whole.ts", "damaged.ts"):
        write_clip(tmp_path / "a" / name, *kind, frames=40)
    path = tmp_path / "a" / "damaged.ts"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) * 7 // 10] = bytes(len(data) * 7 // 10 - len(data) // 2)
    path.write_bytes(data)
    assert not scan(tmp_path, True, show_progress=False).unreadable
    ((name, reason),) = scan(tmp_path, True, show_progress=False, decode=True).unreadable
    assert name == str(path)
    assert re.match(said, reason)


def test_training_skips_a_picture_that_ends_early_in_a_small_set_too(tmp_path):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    (tmp_path / "data" / "a").mkdir(parents=True)
    for i in range(7):
        noise.save(tmp_path / "data" / "a" / f"{i}.jpg")
    cut(tmp_path / "data" / "a" / "6.jpg", 0.9)
    flags = ["--data-path", "data", "--image-size", 16, "--model", "EqM-Ti/4", "--max-steps", 2]
    result = run_script("train.py", *flags, "--num-workers", 0, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("WARNING skipped unreadable data/a/6.jpg: image file is truncated") == 1
