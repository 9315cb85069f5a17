import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from check_data import summary
from conftest import run_python
from data.batches import EpochStream, UnreadableLog, make_loader
from data.clips import Samples
from data.file_list import Found, Item
from data.form import Form
from data.latents import to_pixels, to_unit_range
from data.scan import find_files, scan, scan_for_training
from data.video import VideoInfo, write_video
from make_moving_shapes import write_avi
from runtime.errors import UserError

CLASSES = ("CircleRight", "CircleUp", "SquareRight", "SquareUp")


def ramp(num_frames: int, side: int = 16) -> np.ndarray:
    """Frames whose grey level is 8 times their index."""
    return np.stack([np.full((side, side, 3), 8 * i, np.uint8) for i in range(num_frames)])


def halves(num_frames: int, side: int = 16) -> np.ndarray:
    """Frames that are white on the left and black on the right."""
    frames = np.zeros((num_frames, side, side, 3), np.uint8)
    frames[:, :, : side // 2] = 255
    return frames


def make_set(folder: Path, frames: np.ndarray, count: int = 8) -> Found:
    """Clips of the same frames in class folders A and B in turn."""
    for i in range(count):
        path = folder / "AB"[i % 2] / f"{i}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_avi(path, frames)
    return scan(folder, video=True, show_progress=False)


def samples_of(found: Found, **changes: object) -> Samples:
    seed = changes.pop("seed", 0)
    form = replace(Form(found.videos is not None, image_size=16, clip_len=4, frame_interval=3), **changes)
    return Samples(found, form, seed)


def frame_indices(sample: dict) -> list[int]:
    """Which frames of a `ramp` a sample shows."""
    return [round(level / 8) for level in sample["x"].float().mean(dim=(0, 2, 3)).tolist()]


def labels(folder: Path, video: bool = True) -> dict[str, str]:
    """Class by path below the folder."""
    found = find_files(folder, video)
    return {str(Path(path).relative_to(folder.parent)): found.classes[label] for path, label in found.samples}


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_class_folders_give_sorted_classes_and_every_kind_of_video(tmp_path):
    root = tmp_path / "train"
    touch(root / "Swing" / "1.AVI", root / "Dive" / "2.mp4", root / "Dive" / "deep" / "3.mkv", root / "Box" / "4.webm")
    touch(root / "Box" / "5.mov", root / "Box" / "notes.txt", root / "Empty" / "0.png", root / "loose.avi")
    found = find_files(root, video=True)
    assert found.classes == ("Box", "Dive", "Swing")
    assert Counter(found.classes[label] for _, label in found.samples) == {"Box": 2, "Dive": 2, "Swing": 1}
    assert labels(root)["train/Dive/deep/3.mkv"] == "Dive"


@pytest.mark.parametrize("table", ["train/train.csv", "train.csv"])
def test_a_csv_inside_or_beside_the_folder_names_the_classes(tmp_path, table):
    touch(tmp_path / "train" / "a.avi", tmp_path / "train" / "b.avi")
    (tmp_path / table).write_text("video_name,tag\nb.avi,Swing\na.avi,Dive\n")
    assert labels(tmp_path / "train") == {"train/a.avi": "Dive", "train/b.avi": "Swing"}
    assert find_files(tmp_path / "train", video=True).classes == ("Dive", "Swing")


def test_the_csv_of_the_folders_own_name_comes_before_train_csv(tmp_path):
    touch(tmp_path / "test" / "a.avi")
    (tmp_path / "train.csv").write_text("video_name,tag\na.avi,Wrong\n")
    (tmp_path / "test.csv").write_text("video_name,tag\na.avi,Right\n")
    assert labels(tmp_path / "test") == {"test/a.avi": "Right"}
    (tmp_path / "test.csv").unlink()
    assert labels(tmp_path / "test") == {"test/a.avi": "Wrong"}


def test_a_csv_with_clip_paths_of_its_own_finds_the_files(tmp_path):
    flat, nested = tmp_path / "flat" / "train", tmp_path / "nested" / "train"
    touch(flat / "v_Swing_g01_c01.avi", nested / "clips" / "v_Swing_g01_c01.avi")
    header = "clip_name,clip_path,label\n"
    (flat.parent / "train.csv").write_text(f"{header}v_Swing_g01_c01,/train/Swing/v_Swing_g01_c01.avi,Swing\n")
    assert labels(flat) == {"train/v_Swing_g01_c01.avi": "Swing"}
    (nested.parent / "train.csv").write_text(f"{header}v_Swing_g01_c01,/train/clips/v_Swing_g01_c01.avi,Dive\n")
    # A folder that holds videos counts as a class, whatever the CSV says.
    assert labels(nested) == {"train/clips/v_Swing_g01_c01.avi": "clips"}


def test_a_csv_of_a_spreadsheet_with_byte_order_mark_and_more_columns_is_read(tmp_path):
    touch(tmp_path / "train" / "ä, b.avi")
    text = 'tag,frames,video_name\r\nSwing,9,"ä, b.avi"\r\n'
    (tmp_path / "train" / "train.csv").write_bytes(text.encode("utf-8-sig"))
    assert labels(tmp_path / "train") == {"train/ä, b.avi": "Swing"}


def test_a_csv_of_a_folder_named_by_a_dot_is_found(tmp_path, monkeypatch):
    touch(tmp_path / "train" / "a.avi")
    (tmp_path / "train.csv").write_text("video_name,tag\na.avi,Swing\n")
    monkeypatch.chdir(tmp_path / "train")
    found = find_files(Path(), video=True)
    assert (found.classes, found.samples) == (("Swing",), [("a.avi", 0)])


def test_class_folders_win_over_a_csv(tmp_path):
    touch(tmp_path / "train" / "Swing" / "a.avi")
    (tmp_path / "train.csv").write_text("video_name,tag\na.avi,Dive\n")
    assert labels(tmp_path / "train") == {"train/Swing/a.avi": "Swing"}


def test_flat_ucf_names_carry_their_class(tmp_path):
    root = tmp_path / "train"
    touch(root / "v_YoYo_g08_c01.avi", root / "v_Long_Jump_g01_c10.avi", root / "v_YoYo_g25_c02.avi")
    found = labels(root)
    assert found == {
        "train/v_Long_Jump_g01_c10.avi": "Long_Jump",
        "train/v_YoYo_g08_c01.avi": "YoYo",
        "train/v_YoYo_g25_c02.avi": "YoYo",
    }


def test_images_lie_in_class_folders(tmp_path):
    touch(
        tmp_path / "train" / "cat" / "a.png", tmp_path / "train" / "ant" / "b.JPEG", tmp_path / "train" / "x" / "c.avi"
    )
    assert labels(tmp_path / "train", video=False) == {"train/cat/a.png": "cat", "train/ant/b.JPEG": "ant"}


def test_a_scan_opens_every_file_and_names_the_unreadable(tmp_path):
    make_set(tmp_path, ramp(10), count=4)
    (tmp_path / "A" / "0.avi").write_text("no video")
    (tmp_path / "B" / "9.avi").touch()
    found = scan(tmp_path, video=True, show_progress=False)
    assert found.classes == ("A", "B")
    assert [Path(item.path).name for item in found] == ["2.avi", "1.avi", "3.avi"]
    assert [item.label for item in found] == [0, 1, 1]
    assert {Path(path).name for path, _ in found.unreadable} == {"0.avi", "9.avi"}
    assert all("Invalid data" in reason for _, reason in found.unreadable)


def test_up_to_a_tenth_of_unreadable_files_is_let_through(tmp_path):
    make_set(tmp_path, ramp(3), count=9)
    (tmp_path / "B" / "broken.avi").touch()
    found = scan_for_training(tmp_path, video=True, show_progress=False)
    assert (len(found), len(found.unreadable)) == (9, 1)
    (tmp_path / "B" / "broken-too.avi").touch()
    with pytest.raises(UserError, match="2 of 11"):
        scan_for_training(tmp_path, video=True, show_progress=False)


def test_clips_shorter_than_the_window_are_counted():
    items = [Item("", 0, VideoInfo(range(n), 25.0)) for n in (1, 9, 10, 11)]
    form = Form(True, 16, clip_len=4, frame_interval=3)
    assert form.window == 10
    assert Found.of_items("", ("A",), items).shorter_than(form.window) == 2
    assert Form(True, 16, clip_len=1, frame_interval=3).window == 1


def test_the_mean_frame_rate_is_over_clips():
    items = [Item("", 0, VideoInfo(range(9), rate)) for rate in (25.0, 25.0, 30.0, 60.0)]
    assert Found.of_items("", ("A",), items).mean_frame_rate() == 35.0


def test_the_listing_says_classes_rates_lengths_and_unreadable_files(tmp_path):
    root = tmp_path / "train"
    make_set(root, ramp(10), count=3)
    write_video(root / "B" / "fast.mp4", ramp(6, 16), 30)
    (root / "A" / "broken.avi").write_text("no video")
    result = run_python("check_data.py", root, "--video", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        f"{root}: 4 clips of 2 classes",
        "  A: 2",
        "  B: 2",
        "frames a second: 25 (3 clips), 30 (1 clips)",
        "frames a clip: 6 to 10, median 10",
        "unreadable files: 1",
        f"  {root}/A/broken.avi: Invalid data found when processing input",
    ]


def test_a_set_without_a_readable_file_can_be_listed(tmp_path):
    touch(tmp_path / "A" / "a.avi")
    lines = list(summary(scan(tmp_path, video=True, show_progress=False), video=True))
    assert lines[0] == f"{tmp_path}: 0 clips of 1 classes"
    assert "unreadable files: 1" in lines


def test_the_same_key_is_the_same_sample_and_others_differ(shapes):
    samples = samples_of(scan(shapes, True, False), frame_interval=1, flip=True)
    again = samples_of(scan(shapes, True, False), frame_interval=1, flip=True)
    other_seed = samples_of(scan(shapes, True, False), frame_interval=1, flip=True, seed=1)
    keys = [(epoch, index) for epoch in range(3) for index in range(4)]
    assert all(torch.equal(samples[key]["x"], again[key]["x"]) for key in keys)
    assert not all(torch.equal(samples[key]["x"], other_seed[key]["x"]) for key in keys)
    assert not torch.equal(samples[0, 0]["x"], samples[0, 5]["x"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("num_workers", "context"), [(1, "fork"), (3, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_batches_do_not_depend_on_the_number_of_workers(shapes, num_workers, context):
    samples = samples_of(scan(shapes, True, False), flip=True, frame_interval=2)
    stream = EpochStream(len(samples.found), 4, 6, seed=0, first=0, rank=0, ranks=1)
    alone = list(make_loader(samples, stream, 0, pin_memory=False))
    loader = DataLoader(samples, batch_sampler=stream, num_workers=num_workers, multiprocessing_context=context)
    for ours, theirs in zip(alone, loader, strict=True):
        assert torch.equal(ours["x"], theirs["x"])
        assert torch.equal(ours["label"], theirs["label"])
        assert torch.equal(ours["seconds_per_frame"], theirs["seconds_per_frame"])


def test_a_batch_has_the_shapes_and_types_that_training_takes(shapes):
    samples = samples_of(scan(shapes, True, False))
    stream = EpochStream(len(samples.found), 4, 1, seed=0, first=0, rank=0, ranks=1)
    (batch,) = make_loader(samples, stream, 0, pin_memory=False)
    assert (batch["x"].shape, batch["x"].dtype) == ((4, 3, 4, 16, 16), torch.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((4,), torch.int64)
    assert (batch["seconds_per_frame"].shape, batch["seconds_per_frame"].dtype) == ((4,), torch.float32)
    assert batch["unreadable"] == [[]] * 4


def test_a_flip_is_one_for_the_whole_clip_and_about_every_second_clip(tmp_path):
    samples = samples_of(make_set(tmp_path, halves(12), count=2), flip=True)
    flipped = 0
    for epoch in range(40):
        x = samples[epoch, 0]["x"].float()
        bright_on_the_left = (x[..., :6].mean(dim=(0, 2, 3)) > 128).tolist()  # for each frame
        assert len(set(bright_on_the_left)) == 1
        flipped += not bright_on_the_left[0]
    assert 10 <= flipped <= 30


def test_nothing_is_flipped_without_flip(tmp_path):
    samples = samples_of(make_set(tmp_path, halves(12), count=2), flip=False)
    assert all(samples[epoch, 0]["x"][..., :6].float().mean() > 128 for epoch in range(20))


@pytest.mark.parametrize("frame_interval", [1, 2, 3, 5])
def test_frames_lie_an_interval_apart_from_a_place_that_varies_by_epoch(tmp_path, frame_interval):
    samples = samples_of(make_set(tmp_path, ramp(30), count=1), frame_interval=frame_interval)
    starts = set()
    for epoch in range(60):
        indices = frame_indices(samples[epoch, 0])
        assert set(np.diff(indices)) == {frame_interval}
        starts.add(indices[0])
    last_start = 30 - samples.form.window
    assert len(starts) > 5
    assert min(starts) <= 3
    assert last_start - 3 <= max(starts) <= last_start


def test_a_clip_as_long_as_the_window_is_taken_whole(tmp_path):
    samples = samples_of(make_set(tmp_path, ramp(10), count=1))
    assert frame_indices(samples[0, 0]) == [0, 3, 6, 9]


def test_a_short_clip_holds_its_last_frame(tmp_path):
    samples = samples_of(make_set(tmp_path, ramp(5), count=1), clip_len=6)
    assert frame_indices(samples[0, 0]) == [0, 3, 4, 4, 4, 4]
    one_frame = samples_of(make_set(tmp_path / "one", ramp(1), count=1), clip_len=3)
    assert frame_indices(one_frame[0, 0]) == [0, 0, 0]


def test_seconds_per_frame_follow_each_clips_own_rate(tmp_path):
    for i, rate in enumerate((10, 25, 30)):
        (tmp_path / "A").mkdir(exist_ok=True)
        write_video(tmp_path / "A" / f"{i}.mp4", ramp(12), rate)
    samples = samples_of(scan(tmp_path, True, False), frame_interval=2)
    found = [float(samples[0, i]["seconds_per_frame"]) for i in range(3)]
    assert found == pytest.approx([2 / 10, 2 / 25, 2 / 30], rel=1e-4)


def test_pixels_go_to_the_unit_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_unit_range(pixels)
    assert (x.min(), x.max(), x.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_pixels(x), pixels)
    assert to_pixels(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 128, 255]


def stream_keys(num_items: int, global_batch: int, num_batches: int, **changes: int) -> list[list[tuple[int, int]]]:
    settings = {"seed": 0, "first": 0, "rank": 0, "ranks": 1} | changes
    stream = EpochStream(num_items, global_batch, num_batches, **settings)
    assert len(stream) == num_batches
    return list(stream)


def test_every_epoch_is_another_order_of_the_whole_set():
    keys = [key for batch in stream_keys(12, 4, 9) for key in batch]
    orders = [[index for epoch, index in keys if epoch == e] for e in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert keys == [key for batch in stream_keys(12, 4, 9) for key in batch]
    assert keys != [key for batch in stream_keys(12, 4, 9, seed=1) for key in batch]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_share_the_batches_that_one_would_have(ranks):
    whole = stream_keys(10, 8, 7)
    parts = [stream_keys(10, 8, 7, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [[key for part in step for key in part] for step in zip(*parts, strict=True)] == whole


def test_a_set_smaller_than_a_batch_goes_on_in_the_next_epoch():
    (batch,) = stream_keys(3, 8, 1)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(index for _, index in batch[:3]) == sorted(index for _, index in batch[3:6]) == [0, 1, 2]


def test_a_stream_from_the_middle_is_the_rest_of_the_whole_one():
    assert stream_keys(7, 4, 4, first=12) == stream_keys(7, 4, 7)[3:]


def test_a_clip_that_becomes_unreadable_is_replaced_and_named(tmp_path):
    found = make_set(tmp_path, ramp(12), count=4)
    broken = Path(found[0].path)
    broken.write_text("gone bad")
    samples = samples_of(found)
    sample = samples[0, 0]
    assert sample["unreadable"][0][0] == str(broken)
    assert sample["x"].float().mean() > 0
    names = {frozenset(path for path, _ in samples[epoch, 0]["unreadable"]) for epoch in range(10)}
    assert names == {frozenset([str(broken)])}
    assert {int(samples[epoch, 0]["label"]) for epoch in range(20)} == {0, 1}  # the replacement's own
    assert samples[0, 1]["unreadable"] == []


def test_training_ends_when_no_clip_can_be_read_any_more(tmp_path):
    found = make_set(tmp_path, ramp(12), count=30)
    for item in found:
        Path(item.path).unlink()
    sample = samples_of(found)[0, 0]
    with pytest.raises(UserError, match="30 files cannot be read, .*check_data.py --decode"):
        UnreadableLog(found).add([sample["unreadable"]])


def test_unreadable_clips_are_named_once_and_end_training_above_a_tenth():
    found = Found.of_items("", ("A",), [Item(str(i), 0, None) for i in range(29)], (("scanned", "broken"),))
    unreadable = UnreadableLog(found)
    three, seven = ("3", "cut"), ("7", "gone")
    unreadable.add([[], [seven, three], [three]])
    assert unreadable.exchange() == [three, seven]
    unreadable.add([[seven], []])
    assert unreadable.exchange() == []
    assert unreadable.known == {"scanned", "3", "7"}
    unreadable.add([[("5", "cut")]])
    with pytest.raises(UserError, match="4 of 30 files cannot be read, for example 5: cut"):
        unreadable.exchange()


def test_a_table_of_another_split_beside_a_flat_folder_is_passed_over(tmp_path):
    touch(tmp_path / "test" / "v_Swing_g01_c01.avi", tmp_path / "train" / "v_Dive_g08_c01.avi")
    (tmp_path / "train.csv").write_text("clip_name,clip_path,label\nv,/train/v_Dive_g08_c01.avi,Dive\n")
    assert labels(tmp_path / "test") == {"test/v_Swing_g01_c01.avi": "Swing"}
    assert labels(tmp_path / "train") == {"train/v_Dive_g08_c01.avi": "Dive"}


def test_a_broken_image_of_any_format_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.ppm").write_bytes(b"P6\nnot a number\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "a" / "1.png")
    (path, _), *others = scan(tmp_path, video=False, show_progress=False).unreadable
    assert Path(path).name == "0.ppm"
    assert not others


def test_images_are_cropped_to_their_centre_and_share_the_keys(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = (255, 128, 0)
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "0.png")
    Image.fromarray(picture[..., 0]).save(tmp_path / "a" / "grey.png")
    (tmp_path / "a" / "broken.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:60])
    found = scan(tmp_path, video=False, show_progress=False)
    assert [Path(path).name for path, _ in found.unreadable] == ["broken.png"]
    sample = samples_of(found)[0, 0]
    assert sample["x"].shape == (3, 16, 16)
    assert np.abs(sample["x"][:, :, 2:-2].numpy().astype(int) - np.reshape([255, 128, 0], (3, 1, 1))).max() <= 3
    assert sample["seconds_per_frame"] == 0
    assert samples_of(found)[0, 1]["x"].shape == (3, 16, 16)


def test_an_image_that_the_scan_cannot_tell_to_be_cut_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(noise).save(tmp_path / "a" / f"{i}.jpg")
    cut = tmp_path / "a" / "0.jpg"
    cut.write_bytes(cut.read_bytes()[:-400])
    sample = samples_of(scan(tmp_path, video=False, show_progress=False))[0, 0]
    ((path, reason),) = sample["unreadable"]
    assert path == str(cut)
    assert "truncated" in reason


def test_the_embedded_set_is_found_whole(shapes):
    found = scan_for_training(shapes, video=True, show_progress=False)
    assert found.classes == CLASSES
    assert Counter(item.label for item in found) == dict.fromkeys(range(4), 4)
    assert found.mean_frame_rate() == pytest.approx(25)
    assert all(len(item.video.times) == 16 for item in found)


def test_real_clips_are_found_and_read(real_clips):
    found = scan_for_training(real_clips, video=True, show_progress=False)
    assert not found.unreadable
    assert len(found.classes) >= 2
    samples = samples_of(found, image_size=64)
    for index in range(0, len(found), 4):
        sample = samples[0, index]
        assert sample["x"].shape == (3, 4, 64, 64)
        assert sample["x"].float().std() > 5
        rate = found[index].video.frames_per_second
        assert float(sample["seconds_per_frame"]) == pytest.approx(3 / rate)


def test_real_clips_beside_a_csv_are_found_as_in_class_folders(real_clips, tmp_path):
    for path in real_clips.glob("*/*.avi"):
        touch(tmp_path / "train" / path.name)
        shutil.copy(path, tmp_path / "train" / path.name)
    by_name = labels(tmp_path / "train")
    shutil.copy(real_clips.parent / "train.csv", tmp_path / "train.csv")
    assert labels(tmp_path / "train") == by_name
    in_folders = {f"train/{path.name}": path.parent.name for path in real_clips.glob("*/*.avi")}
    assert by_name == in_folders
