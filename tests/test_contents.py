"""What a PATH holds: kinds, sizes, windows, and .npz of samples."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_pack
from data.contents import Kind, classes_asked, folder_sizes, kind_of, npz_content, open_path
from data.form import Form
from data.npz import read_npz
from data.video import probe_video, read_frames, write_video
from runtime.errors import UserError
from runtime.size import Size


def clips(size: int, clip_len: int = 1, interval: int = 1) -> Form:
    return Form(True, size, clip_len, interval)


def save(path, samples: np.ndarray):
    np.savez(path, samples)
    return path


def some_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_the_first_file_says_what_a_folder_or_a_pack_holds(shapes, tmp_path):
    kind = kind_of(shapes)
    assert (kind.video, kind.side, kind.frames) == (True, 32, 16)
    assert kind.frames_per_second == pytest.approx(25)
    make_pack(shapes, tmp_path / "pack", image_size=16)
    packed = kind_of(tmp_path / "pack")
    assert (packed.video, packed.side, packed.frames) == (True, 16, 16)
    assert kind_of(save(tmp_path / "a.npz", some_pixels(5, 3, 8, 6, 3))) == Kind(True, Size(8, 6), 3, None)
    assert kind_of(save(tmp_path / "b.npz", some_pixels(5, 8, 6, 3))) == Kind(False, Size(8, 6), 1, None)


def test_a_window_starts_where_it_is_asked_to_in_files_and_packs_alike(shapes, tmp_path):
    make_pack(shapes, tmp_path / "pack")
    clip = sorted(shapes.glob("*/*.avi"))[3]
    expected = read_frames(clip, probe_video(clip), [3, 6, 9, 12], 16)  # of 7 starts, at 0.5
    for path in (shapes, tmp_path / "pack"):
        content = open_path(path, clips(16, 4, 3), None, "this", lambda place: 0.5 if place == 3 else 0.0)
        x, seconds = content.read(3)
        np.testing.assert_array_equal(x.permute(1, 2, 3, 0), expected)
        assert seconds == pytest.approx(3 / 25)
        assert content.classes[3] == clip.parent.name


def test_a_pack_of_another_size_is_refused_in_one_line(shapes, tmp_path):
    make_pack(shapes, tmp_path / "pack")
    with pytest.raises(UserError, match="--image-size 32 takes videos of 32×32 pixels"):
        open_path(tmp_path / "pack", clips(32, 4, 3), None, "--image-size 32")


def test_latents_are_refused_in_one_line(shapes, tmp_path):
    from conftest import BlockMeans

    make_pack(shapes, tmp_path / "pack", image_size=16, vae=BlockMeans())
    with pytest.raises(UserError, match="latents of 16×16 pixels.*compare pixels"):
        kind_of(tmp_path / "pack")


def test_an_npz_is_read_in_order_and_resized(tmp_path):
    images = some_pixels(4, 8, 8, 3)
    content = npz_content(save(tmp_path / "images.npz", images), Form(False, 8))
    np.testing.assert_array_equal(content.read(2)[0].permute(1, 2, 0), images[2])
    assert npz_content(tmp_path / "images.npz", Form(False, 4)).read(0)[0].shape == (3, 4, 4)
    samples = some_pixels(2, 6, 8, 10, 3)
    content = npz_content(save(tmp_path / "clips.npz", samples), clips(8, 3, 2))
    assert content.read(1)[0].shape == (3, 3, 8, 8)
    np.testing.assert_array_equal(content.read(1)[0].permute(1, 2, 3, 0), samples[1, [0, 2, 4], :, 1:9])
    with pytest.raises(UserError, match="holds clips, and the other side images"):
        npz_content(tmp_path / "clips.npz", Form(False, 8))


def test_floats_from_0_to_1_become_pixels(tmp_path):
    images = some_pixels(3, 4, 4, 3)
    found = read_npz(save(tmp_path / "floats.npz", images.astype(np.float32) / 255))
    np.testing.assert_array_equal(found, images)
    assert found.dtype == np.uint8
    assert read_npz(save(tmp_path / "near.npz", np.full((1, 2, 2, 3), 0.999))).min() == 255  # rounded, not cut off


def bad(value: float) -> np.ndarray:
    samples = np.full((4, 2, 2, 3), 0.5, np.float32)
    samples[2, 0, 0, 0] = value
    return samples


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        (bad(np.nan), "1 of 4 samples, the first at 2, have pixels that are NaN"),
        (bad(np.inf), "the first at 2"),
        (bad(-0.5), r"from -0.5 to 0.5, outside \[0, 1\]"),
        (bad(200.0), "from 0.5 to 200"),
        (np.zeros((4, 2, 2, 3), np.int64), "arr_0 is int64"),
        (np.zeros((4, 3, 2, 2), np.uint8), "the shape"),
        (np.zeros((0, 2, 2, 3), np.uint8), "the shape"),
        (np.array(["a"], object), "is no .npz that can be read"),
    ],
)
def test_numbers_that_are_no_pixels_are_one_line(tmp_path, samples, problem):
    with pytest.raises(UserError, match=problem) as error:
        read_npz(save(tmp_path / "samples.npz", samples))
    assert "\n" not in str(error.value)


def test_what_is_no_npz_of_samples_is_one_line(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", images=some_pixels(2, 2, 2, 3))
    for name, problem in (("text.npz", "is no .npz"), ("none.npz", "cannot be read"), ("other.npz", "no arr_0")):
        with pytest.raises(UserError, match=problem):
            read_npz(tmp_path / name)


def test_folders_that_cannot_be_compared_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, problem in ((tmp_path / "empty", "no videos and no images"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(UserError, match=problem):
            kind_of(path)
    both = tmp_path / "both"
    both.mkdir()
    write_video(both / "a.mp4", some_pixels(4, 16, 16, 3), 25)
    Image.fromarray(some_pixels(8, 8, 3)).save(both / "a.png")
    with pytest.raises(UserError, match="videos and images"):
        kind_of(both)
    assert not kind_of(both, video=False).video
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match="no readable clip in .*a.mp4"):
        kind_of(tmp_path / "broken")
    (tmp_path / "gifs").mkdir()
    (tmp_path / "gifs" / "a.gif").write_text("")
    with pytest.raises(UserError, match="--video-format mp4"):
        kind_of(tmp_path / "gifs")


def test_the_sizes_of_a_folder_are_counted_without_what_cannot_be_read(tmp_path):
    for i, side in enumerate((8, 8, 10)):
        Image.fromarray(some_pixels(side, 12, 3)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("no image")
    assert folder_sizes(tmp_path, False) == {(12, 8): 2, (12, 10): 1}


def test_the_class_asked_for_is_the_tables_or_the_folders(shapes, tmp_path):
    content = open_path(shapes, clips(16, 4, 3), None, "this")
    assert classes_asked(shapes, content) == content.classes
    write_video(tmp_path / "000000.mp4", some_pixels(4, 16, 16, 3), 25)
    write_video(tmp_path / "000001.mp4", some_pixels(4, 16, 16, 3), 25)
    (tmp_path / "samples.csv").write_text("file,class_name\n000001.mp4,CircleUp\n")
    content = open_path(tmp_path, clips(16, 4), None, "this")
    assert classes_asked(tmp_path, content) == ["", "CircleUp"]
    (tmp_path / "samples.csv").write_text("name\n000001.mp4\n")
    with pytest.raises(UserError, match="samples.csv lacks the columns"):
        classes_asked(tmp_path, content)
    assert isinstance(content.read(0)[0], torch.Tensor)
