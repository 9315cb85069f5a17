"""Other forms of data than folders: tar shards, parquet, .npz and class lists give the packs that folders give."""

import fcntl
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from conftest import make_pack, run_ranks, run_script
from data.form import Form
from data.inputs.forms import Reading, expanded, find_archives, find_entries
from data.packs.pack import Pack, is_pack, open_pack
from data.packs.packing import begin_pack, finish, missing_shards
from data.packs.plan import plan_pack
from data.packs.writer import pack_shard
from data.video import write_video
from make_moving_shapes import write_avi
from runtime.errors import UserError

Files = list[tuple[str, str, bytes]]  # class, name, contents


def picture(rng: np.random.Generator, ending: str, side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, 30, 3), dtype=np.uint8)).save(file, ending)
    return file.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Class folders of images and of videos, in several formats. Names and classes are not in the order of time."""
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for i, name in enumerate(["b_dog/z.png", "b_dog/10.jpeg", "a_cat/9.png", "a_cat/sub/1.webp", "b_dog/2.bmp"]):
        (root / "image" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "image" / name).write_bytes(picture(rng, name.rpartition(".")[2], 20 + i))
    for i, name in enumerate(["b_dog/z.avi", "b_dog/1.mp4", "a_cat/7.mkv", "a_cat/sub/0.mp4", "b_dog/gone.mp4"]):
        path = root / "video" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = rng.integers(0, 256, (5 + i, 32, 48, 3), dtype=np.uint8)
        write_avi(path, frames) if path.suffix == ".avi" else write_video(path, frames, 10 + i, path.suffix == ".mkv")
    (root / "video" / "b_dog" / "gone.mp4").write_bytes(b"no video")
    return {kind: root / kind for kind in ("image", "video")}


def files_in(folder: Path) -> Files:
    """The files of class folders, in an order that is neither theirs nor its reverse."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name[::-1])
    return [(path.relative_to(folder).parts[0], str(path.relative_to(folder)), path.read_bytes()) for path in paths]


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def as_tars(folder: Path, files: Files, label: Callable[[str], tuple[str, bytes]]) -> Path:
    """Two tar shards, and each sample's label before or behind it."""
    for shard in range(2):
        members = []
        for i, (name, path, data) in enumerate(files[shard::2]):
            ending, text = label(name)
            members += [(path, data), (path.rpartition(".")[0] + ending, text)][:: 1 if i % 2 else -1]
        write_tar(folder / f"set-00{shard}.tar", [("._hidden.png", b"x"), *members, ("readme.md", b"x")])
    return folder


def as_parquet(folder: Path, files: Files, kind: str, names: Sequence[str] = (), in_struct: bool = True) -> Path:
    """Two parquet files of several row groups, with the metadata of the hub if classes have names."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        some = files[shard::2]
        cells = [{"bytes": data, "path": path} if in_struct else data for _, path, data in some]
        table = pyarrow.table({kind: cells, "label": [names.index(name) if names else name for name, _, _ in some]})
        if names:
            features = {"label": {"names": list(names), "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, folder / f"train-0000{shard}-of-00002.parquet", row_group_size=2)
    return folder


def as_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FORMS = {
    "tar, .cls": lambda out, folder, kind: as_tars(out, files_in(folder), lambda name: (".cls", name.encode())),
    "tar, .txt": lambda out, folder, kind: as_tars(out, files_in(folder), lambda name: (".txt", f"{name}\n".encode())),
    "tar, .json": lambda out, folder, kind: as_tars(
        out, files_in(folder), lambda name: (".json", json.dumps({"label": name, "width": 3}).encode())
    ),
    "braces": lambda out, folder, kind: (
        as_tars(out, files_in(folder), lambda name: (".cls", name.encode())) / "set-{000..001}.tar"
    ),
    "stars": lambda out, folder, kind: as_parquet(out, files_in(folder), kind) / "train-*.parquet",
    "parquet": lambda out, folder, kind: as_parquet(out, files_in(folder), kind),
    "parquet of the hub": lambda out, folder, kind: as_parquet(out, files_in(folder), kind, as_names(folder)),
}


def assert_same(ours: Pack, theirs: Pack) -> None:
    """Equal shards, labels and reasons, in the same order. Names differ."""
    assert [path.read_bytes() for path in ours.shard_files] == [path.read_bytes() for path in theirs.shard_files]
    assert ours.classes == theirs.classes
    for name in ("labels", "lengths", "rates", "shards", "first_frames"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert [reason for _, reason in ours.unreadable] == [reason for _, reason in theirs.unreadable]
    assert len(theirs.labels) > 3


def pack_in_process(source: Path, folder: Path, video: bool, reading: Reading, append: bool = False) -> Pack:
    pack = open_pack(folder, False) if append else None
    plan = plan_pack(source, folder, Form(video, 16), None, reading=reading, pack=pack)
    if plan:
        folder.mkdir(exist_ok=True)
        begin_pack(plan)
        for number in missing_shards(plan):
            pack_shard(plan, number, None, lambda items: None)
        finish(plan)
    return open_pack(folder, show_progress=False)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("form", FORMS)
def test_a_set_gives_the_same_shards_in_any_form(folders, tmp_path, form, kind):
    source = FORMS[form](tmp_path / "set", folders[kind], kind)
    theirs = make_pack(folders[kind], tmp_path / "folders", video=kind == "video")
    assert_same(make_pack(source, tmp_path / "pack", video=kind == "video"), theirs)


def test_plain_bytes_in_other_columns_with_other_labels(folders, tmp_path):
    files = files_in(folders["image"])
    columns = {"jpg": [data for _, _, data in files], "animal": [name for name, _, _ in files]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "set.parquet")
    pack = pack_in_process(tmp_path / "set.parquet", tmp_path / "pack", False, Reading(label="animal", column="jpg"))
    assert all(path.startswith("set.parquet/0000000") for path in pack.paths)
    theirs = make_pack(folders["image"], tmp_path / "folders", video=False)
    assert sorted(shards(pack)) == sorted(shards(theirs))  # without paths, rows of a class keep their order
    assert "--label animal --column jpg" in pack.settings.command(pack.folder)


def shards(pack: Pack) -> list[bytes]:
    return [path.read_bytes() for path in pack.shard_files]


def test_numbers_as_labels_keep_their_order_and_stored_order_is_kept(folders, tmp_path):
    data = files_in(folders["image"])[0][2]
    members = [("a.png", data), ("a.cls", b"10"), ("b.png", data), ("b.cls", b"9"), ("c.png", data), ("c.cls", b"10")]
    tar = write_tar(tmp_path / "set.tar", members)
    by_name, stored = (find_entries(tar, False, Reading(stored=stored)) for stored in (False, True))
    assert by_name.classes == stored.classes == ("9", "10")
    assert [(name[-5], label) for name, label in zip(by_name.names, by_name.labels, strict=True)] == [
        ("b", 0), ("a", 1), ("c", 1)
    ]  # fmt: skip
    assert [name[-5] for name in stored.names] == ["a", "b", "c"]


def test_parquet_that_is_not_stored_by_class_is_noticed(tmp_path):
    rows = {"image": [b"x"] * 400, "label": [i % 4 for i in range(400)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "set.parquet", row_group_size=10)
    assert "row groups are read 4 times each; --order stored" in find_entries(tmp_path, False, Reading()).notes[0]
    assert find_entries(tmp_path, False, Reading(stored=True)).notes == ()


@pytest.mark.parametrize("with_labels", [True, False])
def test_an_npz_gives_the_shards_of_its_pictures(tmp_path, with_labels):
    rng = np.random.default_rng(0)
    images, names = rng.integers(0, 256, (6, 20, 30, 3), dtype=np.uint8), list("abcabc" if with_labels else "ssssss")
    clips = rng.integers(0, 256, (6, 4, 20, 30, 3), dtype=np.uint8)
    labels = {"labels": np.array(names)} if with_labels else {}
    for samples, video in ((images, False), (clips, True)):
        folder, path = tmp_path / f"folder-{video}", tmp_path / f"npz-{video}" / "s.npz"
        path.parent.mkdir()
        np.savez(path, arr_0=samples, **labels)
        for i, (sample, name) in enumerate(zip(samples, names, strict=True)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_video(folder / name / f"{i}.mkv", sample, 10, True) if video else Image.fromarray(sample).save(
                folder / name / f"{i}.png"
            )
        ours = pack_in_process(path, tmp_path / f"a-{video}", video, Reading(frames_per_second=10.0))
        assert_same(ours, make_pack(folder, tmp_path / f"b-{video}", video=video))


def listed(folder: Path, files: dict[str, str | dict | list]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return folder / next(iter(files))


LISTS = {
    "UCF-101": (
        ["v_Up_g01_c01.avi", "v_Down_g01_c01.avi", "v_Up_g02_c01.avi"],
        {
            "trainlist01.txt": "Up/v_Up_g02_c01.avi 1\nUp/v_Up_g01_c01.avi 1\nDown/v_Down_g01_c01.avi 2\n",
            "classInd.txt": "1 Up\n2 Down\n",
        },
        [("Up", "v_Up_g01_c01.avi"), ("Up", "v_Up_g02_c01.avi"), ("Down", "v_Down_g01_c01.avi")],
    ),
    "Kinetics": (
        ["some dir/-Kx_000010_000020.mp4", "a_000000_000010.mp4", "b_000001_000011.mp4"],
        {"train.csv": "label,youtube_id,time_start,time_end,split\nup,-Kx,10,20,x\ndown,a,0,10,x\nup,z,1,2,x\n"},
        [("down", "a_000000_000010.mp4"), ("up", "some dir/-Kx_000010_000020.mp4")],
    ),
    "Something-Something": (
        ["12.webm", "7.webm"],
        {
            "train.json": [
                {"id": "7", "label": "Holding a pen", "template": "Holding [something]"},
                {"id": "12", "label": "Dropping"},
            ],
            "labels.json": {"Holding something": "0", "Dropping": "1"},
        },
        [("Holding something", "7.webm"), ("Dropping", "12.webm")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_class_list_gives_the_classes_in_its_order(tmp_path, name):
    files, lists, wanted = LISTS[name]
    for file in files:
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / file).touch()
    labels = listed(tmp_path / "lists", lists)
    entries = find_entries(tmp_path / "set", True, Reading(labels))
    found = [(entries.classes[i], name) for i, name in zip(entries.labels, entries.names, strict=True)]
    assert found == wanted
    assert [Path(entries.open(i)) for i in range(len(found))] == [tmp_path / "set" / file for _, file in wanted]
    assert any("left out" in note or "not there" in note for note in entries.notes) == (name == "Kinetics")


PNG = picture(np.random.default_rng(0), "png", 20)
SAMPLE = [("a.png", PNG), ("a.cls", b"1")]


def cut(path: Path, size: int) -> Path:
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def a_tar(*members: tuple[str, bytes]) -> Callable[[Path], Path]:
    return lambda path: write_tar(path / "set.tar", [*members])


def a_parquet(**columns: list) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        parquet.write_table(pyarrow.table(columns), path / "set.parquet")
        return path / "set.parquet"

    return write


def an_npz(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        np.savez(path / "set.npz", **arrays)
        return path / "set.npz"

    return write


def written(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        (path / name).write_bytes(data)
        return path / name

    return write


def huge_header(path: Path) -> Path:
    """A tar whose long name claims a gigabyte, in a sparse file."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**30
    (path / "set.tar").write_bytes(member.tobuf())
    return cut(path / "set.tar", 2**31)


def two_splits(path: Path) -> Path:
    for name in ("train-0.tar", "test-0.tar"):
        write_tar(path / name, SAMPLE)
    return path


PICTURES = np.zeros((2, 8, 8, 3), np.uint8)
BAD = {
    "a tar cut in a member": (lambda p: cut(a_tar(*SAMPLE)(p), 700), "damaged, cut short or no tar"),
    "a tar cut in a header": (lambda p: cut(a_tar(*SAMPLE)(p), 1100), "damaged|cut short"),
    "a tar cut behind a member": (lambda p: cut(a_tar(*SAMPLE[::-1])(p), 1024), "damaged or cut short"),
    "an empty tar": (written("set.tar", b""), "cut short or no tar: empty file"),
    "a tar that is text": (written("set.tar", b"hello" * 500), "damaged, cut short or no tar"),
    "a compressed tar": (written("set.tar", b"\x1f\x8b\x08" + bytes(600)), "damaged, cut short or no tar"),
    "a huge header": (huge_header, "it has a header of 1,073,741,824 bytes"),
    "a path out of a tar": (a_tar(("../../a.png", PNG), ("../../a.cls", b"1")), r"\.\./\.\./a\.png leads out"),
    "an absolute path": (a_tar(("/etc/a.png", PNG), ("/etc/a.cls", b"1")), "/etc/a.png leads out"),
    "no label": (a_tar(("a.png", PNG)), "a.png has no label: give it a .cls"),
    "an empty label": (a_tar(("a.png", PNG), ("a.cls", b"")), "a.cls: the label is a text of 0 letters"),
    "a label as bytes": (a_tar(("a.png", PNG), ("a.cls", b"\xff\x00")), "a.cls cannot be read as a label"),
    "a label as a list": (a_tar(("a.png", PNG), ("a.json", b'{"label": [1]}')), "label is of type list"),
    "a label as a fraction": (a_tar(("a.png", PNG), ("a.json", b'{"label": 1.5}')), "label is of type float"),
    "a label below 0": (a_tar(("a.png", PNG), ("a.json", b'{"label": -1}')), "the label is -1"),
    "another field": (a_tar(("a.png", PNG), ("a.json", b'{"cls": 1}')), "has no 'label', and has cls: name.*--label"),
    "deep json": (a_tar(("a.png", PNG), ("a.json", b"[" * 100_000)), "a.json cannot be read as a label"),
    "a huge label": (a_tar(("a.png", PNG), ("a.txt", b"x" * 2**21)), "has 2,097,152 bytes, which is no label"),
    "numbers and names": (a_tar(*SAMPLE, ("b.png", PNG), ("b.cls", b"dog")), "the label 'dog', and .* number 1"),
    "two images of a sample": (a_tar(*SAMPLE, ("a.jpg", PNG)), "a.png and a.jpg are one sample"),
    "no images": (a_tar(("a.mp4", b"x"), ("a.cls", b"1")), "no images in .*add --video"),
    "a missing tar": (lambda p: p / "set-{0..1}.tar", "set-0.tar is not a file"),
    "too many tars": (lambda p: p / "set-{0..99999999999}.tar", "names no files, or too many"),
    "two splits": (two_splits, r"several splits \(test, train\): name one"),
    "no column of files": (a_parquet(img=[b"x"], label=[1]), "no column 'image', but img, label: name it.*--column"),
    "no column of labels": (a_parquet(image=[b"x"], cls=[1]), "no column 'label', but image, cls: name it .*--label"),
    "files of another type": (a_parquet(image=[1], label=[1]), "'image' holds int64, not files"),
    "labels of another type": (a_parquet(image=[b"x"], label=[1.5]), "'label' holds double, not classes"),
    "a row without a label": (a_parquet(image=[b"x"] * 2, label=[1, None]), "row 1: the label is of type NoneType"),
    "no rows": (lambda p: a_parquet(image=pyarrow.array([], "binary"), label=pyarrow.array([], "int64"))(p), "no rows"),
    "a cut parquet": (lambda p: cut(a_parquet(image=[b"x"], label=[1])(p), 300), "is damaged, or no parquet"),
    "a parquet that is text": (written("set.parquet", b"hello" * 99), "is damaged, or no parquet"),
    "an npz of numbers": (an_npz(arr_0=np.zeros((2, 8, 8, 3), int)), "arr_0 is int64: save pixels"),
    "labels as fractions": (an_npz(arr_0=PICTURES, labels=np.zeros(2)), "labels are float64"),
    "too few labels": (an_npz(arr_0=PICTURES, labels=np.array([1])), "has 1 labels for 2 samples"),
    "clips as images": (an_npz(arr_0=PICTURES[None]), "holds clips: add --video"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_one_line_and_nothing_is_made(tmp_path, name):
    make, words = BAD[name]
    source = make(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        plan_pack(source, tmp_path / "pack", Form(False, 16), None, reading=Reading())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pack").exists()


BAD_LISTS = {
    "a list of another kind": ({"list.xml": "x"}, "none of the known lists"),
    "no such columns": ({"list.csv": "a;b\n1;2\n"}, "separate them by commas"),
    "times that are no numbers": ({"list.csv": "label,youtube_id,time_start,time_end\nup,a,x,1\n"}, "whole seconds"),
    "no json": ({"list.json": "[{"}, "is no JSON"),
    "json without ids": ({"list.json": '[{"label": "up"}]'}, "no list of objects with an id"),
    "json without labels": ({"list.json": '[{"id": "a"}]'}, "entry 1: the label is of type NoneType"),
    "a class that labels.json lacks": (
        {"list.json": '[{"id": "a", "label": "up"}]', "labels.json": '{"down": "0"}'},
        "the class 'up', which .* not name",
    ),
    "a number of another class": ({"list.txt": "Up/a.avi 2\n", "classInd.txt": "1 Up\n2 Down\n"}, "is no Class/file"),
    "two classes of a file": ({"list.csv": "video_name,tag\na.avi,up\na.avi,down\n"}, "listed as up and as down"),
    "none of the files": ({"list.csv": "video_name,tag\nz.avi,up\n"}, "none of the files .* looked for z"),
    "an empty list": ({"list.txt": "\n"}, "lists no files"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_list_is_one_line(tmp_path, name):
    files, words = BAD_LISTS[name]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.avi").touch()
    with pytest.raises(UserError, match=words):
        find_entries(tmp_path / "set", True, Reading(listed(tmp_path / "lists", files)))


def test_a_huge_or_changed_member_is_skipped_as_a_broken_file_is(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("data.inputs.tars.MAX_MEMBER", 10_000)
    monkeypatch.setattr("data.inputs.parquet.MAX_MEMBER", 10_000)
    files = [("b", f"{i}.png", PNG) for i in range(5)] + [("a", "huge.png", PNG + bytes(10_000))]
    tars, rows = (
        as_tars(tmp_path / "t", files, lambda name: (".cls", name.encode())),
        as_parquet(tmp_path / "p", files, "image"),
    )
    for i, source in enumerate((tars, rows)):
        pack = make_pack(source, tmp_path / f"pack{i}", video=False)
        ((name, reason),) = pack.unreadable
        assert "huge.png" in name
        assert "may have 10,000" in reason
        assert pack.classes == ("b",)
    entries = find_entries(tars, False, Reading())
    cut(tars / "set-000.tar", 512)
    reasons = []
    for i in range(len(entries)):
        try:
            entries.open(i)
        except Exception as error:
            reasons.append(str(error))
    assert any("has become shorter" in reason for reason in reasons)


def test_a_large_row_group_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data.inputs.parquet.MAX_GROUP", 1000)
    source = a_parquet(image=[bytes(np.random.default_rng(0).bytes(2000))], label=[1])(tmp_path)
    with pytest.raises(UserError, match="a row group has .* bytes, over the limit of 1,000: write it with smaller"):
        find_entries(source, False, Reading())


def test_nothing_in_a_tar_is_followed_or_unpacked(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE), ("p.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(member)
        for name, data in SAMPLE:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.iterdir())
    entries = find_entries(tmp_path / "set.tar", False, Reading())
    assert list(entries.names) == ["set.tar/a.png"]
    assert entries.open(0).data == PNG
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a{8..11}.tar", ["a8.tar", "a9.tar", "a10.tar", "a11.tar"]),
        ("a{08..10}.tar", ["a08.tar", "a09.tar", "a10.tar"]),
        ("{x,y}{0..1}.tar", ["x0.tar", "x1.tar", "y0.tar", "y1.tar"]),
    ],
)
def test_braces_are_expanded_as_by_a_shell(pattern, names):
    assert list(expanded(pattern)) == names


def test_class_folders_beside_archives_are_class_folders(folders, tmp_path):
    shutil.copytree(folders["image"], tmp_path / "set")
    write_tar(tmp_path / "set" / "original.tar", SAMPLE)
    assert find_archives(tmp_path / "set") == []


def test_the_ranks_of_the_command_pack_archives_and_the_pack_names_the_command(folders, tmp_path):
    source = as_tars(
        tmp_path / "set", files_in(folders["video"]), lambda name: (".json", json.dumps({"animal": name}).encode())
    )
    options = ("--video", "--image-size", 16, "--label", "animal")
    result = run_ranks(2, "prepare.py", source, tmp_path / "pack", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "4 clips of 2 classes" in result.stdout
    assert "skipped unreadable" in result.stdout
    assert "left out: 2 .md, 2 hidden in the tars" in result.stdout
    assert "clip/s]" in result.stderr
    assert "00:00<00:00" in result.stderr  # the time that is left
    pack = open_pack(tmp_path / "pack", False)
    assert pack.settings.command(pack.folder).endswith("--image-size 16 --label animal")
    assert_same(pack, make_pack(folders["video"], tmp_path / "folders"))


# Several machines, and packs that grow.


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_machines_pack_their_shares_and_the_last_one_joins(shapes, tmp_path, order):
    options = ("--video", "--image-size", 16, "--num-workers", 1)
    packed = []
    (tmp_path / "a").mkdir()
    other_machine = os.open(tmp_path / "a", os.O_RDONLY)
    fcntl.flock(other_machine, fcntl.LOCK_SH)
    result = run_script("prepare.py", shapes, tmp_path / "a", *options, cwd=tmp_path)
    assert "another run is packing" in result.stderr
    for place, part in enumerate(order):
        result = run_script("prepare.py", shapes, tmp_path / "a", *options, "--part", f"{part}/3", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        packed.append(int(result.stdout.split("packed ")[1].split()[0]))
        if place < 2:
            left = 16 - sum(packed)
            assert f"part {part} of 3 is done: other parts have {left} shards left" in result.stdout
            with pytest.raises(UserError, match="half-made"):
                is_pack(tmp_path / "a")
    assert f"{tmp_path}/a is whole: 16 clips" in result.stdout
    os.close(other_machine)
    assert sorted(packed) == [5, 5, 6]
    assert_same(open_pack(tmp_path / "a", False), make_pack(shapes, tmp_path / "b"))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "²/3", "1/100000"])
def test_a_share_that_is_none_is_refused(tmp_path, text, capsys, monkeypatch):
    from prepare import parse_args

    monkeypatch.setattr("sys.argv", ["prepare.py", "a", "b", f"--part={text}"])
    with pytest.raises(SystemExit, match="2"):
        parse_args()
    assert "is not K/N, as 1/4" in capsys.readouterr().err


def grown(folder: Path, source: Path, chosen: str) -> Path:
    """A copy of some class folders."""
    for path in source.glob(chosen):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
    return folder


def frames_of(pack: Pack) -> dict[str, tuple[str, bytes]]:
    """The class and the frames of each item."""
    sizes = pack.lengths * pack.settings.frame_bytes
    places = pack.first_frames * pack.settings.frame_bytes
    shards = [path.read_bytes() for path in pack.shard_files]
    rows = zip(pack.paths, pack.labels, pack.shards, places, sizes, strict=True)
    return {path: (pack.classes[label], shards[i][first : first + size]) for path, label, i, first, size in rows}


def test_a_pack_grows_by_new_files_and_new_classes_and_old_labels_keep_their_meaning(shapes, tmp_path):
    source = grown(tmp_path / "set", shapes, "[CS]*Up/*c0[12].avi")
    first = make_pack(source, tmp_path / "pack")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "pack").iterdir()}
    grown(source, shapes, "*Right/*c01.avi")  # CircleRight would be the first class
    grown(source, shapes, "CircleUp/*c0[1-4].avi")
    pack = pack_in_process(source, tmp_path / "pack", True, Reading(), append=True)
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == was for path, was in before.items())
    assert pack.classes == ("CircleUp", "SquareUp", "CircleRight", "SquareRight")
    assert pack.classes[: len(first.classes)] == first.classes
    assert np.array_equal(pack.labels[: len(first)], first.labels)
    whole = make_pack(source, tmp_path / "whole")
    assert frames_of(pack) == frames_of(whole)
    assert [item.path for item in pack.found()] == [str(source / path) for path in pack.paths]
    assert all(Path(item.path).is_file() for item in pack.found())

    grown(source, shapes, "CircleRight/*")
    again = pack_in_process(source, tmp_path / "pack", True, Reading(), append=True)
    assert again.classes == pack.classes
    assert frames_of(again) == frames_of(make_pack(source, tmp_path / "whole2"))
    (tmp_path / "pack" / "more-001" / "shard-00000.bin").unlink()
    with pytest.raises(UserError, match=rf"shard-00000.bin is missing: run .* {tmp_path}/pack/more-001 --video"):
        open_pack(tmp_path / "pack", False)
    make_pack(source, tmp_path / "pack" / "more-001")  # which mends that part alone, though its source has grown
    assert frames_of(open_pack(tmp_path / "pack", False)) == frames_of(again)


def test_while_a_pack_grows_and_after_a_kill_it_is_as_before(shapes, tmp_path):
    source = grown(tmp_path / "set", shapes, "CircleUp/*c01.avi")
    first = make_pack(source, tmp_path / "pack")
    grown(source, shapes, "CircleUp/*c02.avi")
    grown(source, shapes, "SquareUp/*c02.avi")
    plan = plan_pack(source, tmp_path / "pack", Form(True, 16), None, reading=Reading(), pack=first)
    begin_pack(plan)
    pack_shard(plan, 0, None, lambda items: None)
    assert open_pack(tmp_path / "pack", False).paths == first.paths
    options = ("--video", "--image-size", 16, "--append")
    result = run_script("prepare.py", source, tmp_path / "pack", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "packed 1 clips" in result.stdout
    assert f"{tmp_path}/pack is whole: 3 clips of 2 classes" in result.stdout
    assert "1 of 3 files are in" in result.stdout
    result = run_script("prepare.py", source, tmp_path / "pack", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 of 3 files are in" in result.stdout
    assert "packed" not in result.stdout
    assert [path.name for path in (tmp_path / "pack").glob("more-*")] == ["more-001"]


def test_what_cannot_be_appended_is_one_line(shapes, tmp_path):
    source = grown(tmp_path / "set", shapes, "CircleUp/*c0[12].avi")
    with pytest.raises(UserError, match="is not a pack: make one"):
        pack_in_process(source, tmp_path / "none", True, Reading(), append=True)
    pack = make_pack(source, tmp_path / "pack")
    for form, words in ((Form(True, 24), "image_size 16, and this run has 24"), (Form(False, 16), "video True")):
        other = tmp_path / "images"
        (other / "a").mkdir(parents=True, exist_ok=True)
        (other / "a" / "a.png").write_bytes(PNG)
        with pytest.raises(UserError, match=words):
            plan_pack(source if form.video else other, tmp_path / "pack", form, None, reading=Reading(), pack=pack)
    listed(tmp_path, {"list.csv": "video_name,tag\n" + "".join(f"{Path(p).name},Other\n" for p in pack.paths)})
    with pytest.raises(UserError, match="is of the class Other in the source, and of CircleUp in .*: make a new pack"):
        plan_pack(source, tmp_path / "pack", Form(True, 16), None, reading=Reading(tmp_path / "list.csv"), pack=pack)
    assert not list((tmp_path / "pack").glob("more-*"))


def test_the_parts_of_another_pack_are_refused(shapes, tmp_path):
    make_pack(shapes, tmp_path / "pack")
    make_pack(grown(tmp_path / "set", shapes, "SquareUp/*"), tmp_path / "pack" / "more-001")
    with pytest.raises(UserError, match=r"more-001/index.json is damaged"):
        open_pack(tmp_path / "pack", False)
