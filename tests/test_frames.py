"""Frames of videos are read as players show them: turned, of square pixels, whole in interlaced files, on white."""

from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data.frames import DEINTERLACED
from data.images import ON_WHITE
from data.untrusted import Unreadable
from data.video import iterate_frames, probe_video, read_frames, video_size
from test_untrusted import video_of_pngs
from test_video import encode

LOSSLESS = {"qp": "0", "g": "4"}


def moving(count: int = 8, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Smooth frames in colour, moving to the right by 4 pixels each."""
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (6, 16, 3), np.uint8)).resize((width * 2, height), Image.BICUBIC)
    return [np.asarray(wide)[:, width - 4 * i : 2 * width - 4 * i] for i in range(count)]


def all_frames(path: Path, side: int = 24) -> np.ndarray:
    """All frames, (T, side, side, 3): the same from the start, and sought one by one."""
    info = probe_video(path)
    frames = np.stack(list(iterate_frames(path, info, side)))
    assert len(frames) == len(info.times)
    for i in range(len(frames)):
        assert np.array_equal(read_frames(path, info, [i], side)[0], frames[i])
    return frames.astype(int)


# How a camera that is held in some way stores its frames, and the matrix (a, b, c, d) by which they are shown.
MATRICES = {
    "upright": ((1, 0, 0, 1), lambda x: x),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "half turn": ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
    "upside down in a mirror": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    "to be turned clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, 1)),
    "to be turned counterclockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, -1)),
    "turned in a mirror": ((0, -1, -1, 0), lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
}


def with_matrix(path: Path, matrix: Sequence[int]) -> Path:
    """Writes a matrix into the header of an .mp4's or .mov's track."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (value * 2**16 for value in matrix)
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 2**30], ">i4").tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", [".mp4", ".mov"])
@pytest.mark.parametrize("name", MATRICES)
def test_a_video_is_turned_and_mirrored_as_its_file_says_before_it_is_cropped(tmp_path, name, kind):
    matrix, store = MATRICES[name]
    upright = moving(3, height=48, width=80)
    stored = [np.ascontiguousarray(store(frame)) for frame in upright]
    path = with_matrix(encode(tmp_path / f"a{kind}", "libx264rgb", stored, LOSSLESS, "rgb24"), matrix)
    plain = encode(tmp_path / "plain.mp4", "libx264rgb", upright, LOSSLESS, "rgb24")
    assert np.abs(all_frames(path) - all_frames(plain)).max() <= 1
    assert video_size(path) == video_size(plain) == (80, 48)


def of_aspect(path: Path, frames: Sequence[np.ndarray], aspect: Fraction) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=LOSSLESS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("aspect", "squeeze"), [((2, 1), (1, 2)), ((1, 2), (2, 1))], ids=["wide", "high"])
@pytest.mark.parametrize("kind", [".mp4", ".mkv"])
def test_pixels_that_are_not_square_are_made_square(tmp_path, kind, aspect, squeeze):
    shown = moving(3, 64, 96)
    stored = [np.asarray(Image.fromarray(frame).reduce(squeeze[::-1])) for frame in shown]
    path = of_aspect(tmp_path / f"a{kind}", stored, Fraction(*aspect))
    plain = of_aspect(tmp_path / f"plain{kind}", shown, Fraction(1, 1))
    assert np.abs(all_frames(path) - all_frames(plain)).mean() < 2
    assert video_size(path) == ((96, 64) if aspect == (2, 1) else (48, 32))


def test_frames_that_are_long_and_thin_by_their_pixels_are_unreadable(tmp_path):
    with pytest.raises(Unreadable, match="2560x48"):
        probe_video(of_aspect(tmp_path / "a.mkv", moving(2), Fraction(40, 1)))


@pytest.mark.parametrize("content", ["smooth", "noise", "steps"])
def test_a_progressive_video_that_is_marked_as_interlaced_is_the_one_that_is_not(tmp_path, content):
    frames = moving(6, 96, 128)
    if content == "noise":
        frames = list(np.random.default_rng(0).integers(0, 256, (6, 96, 128, 3), np.uint8))
    if content == "steps":
        frames = [np.repeat(np.repeat(frame[::8, ::8], 8, 0), 8, 1) for frame in frames]
    marked = encode(tmp_path / "marked.mp4", "libx264", frames, LOSSLESS | {"x264-params": "tff=1"})
    plain = encode(tmp_path / "plain.mp4", "libx264", frames, LOSSLESS)
    assert np.array_equal(all_frames(marked), all_frames(plain))
    assert probe_video(marked).remarks == (DEINTERLACED,)
    assert probe_video(plain).remarks == ()


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_frames_with_combs_are_deinterlaced_to_the_moment_of_their_upper_field(tmp_path, order):
    fields = moving(16, 96, 128)  # two moments a frame, 4 pixels apart
    upper, lower = fields[::2], fields[1::2]
    woven = [frame.copy() for frame in upper]
    for frame, other in zip(woven, lower, strict=True):
        frame[1::2] = other[1::2]
    path = encode(tmp_path / "a.mp4", "libx264", woven, LOSSLESS | {"x264-params": f"{order}=1"}, "yuv444p")
    plain = encode(tmp_path / "plain.mp4", "libx264", upper, LOSSLESS, "yuv444p")
    combed = encode(tmp_path / "combed.mp4", "libx264", woven, LOSSLESS, "yuv444p")
    found, right, wrong = (all_frames(file, 96) for file in (path, plain, combed))
    assert len(found) == 8
    assert np.abs(found - right).mean() < 0.1 * np.abs(wrong - right).mean()


@pytest.mark.parametrize("transparent", [True, False])
def test_transparent_parts_of_a_video_are_white(tmp_path, transparent):
    alpha = np.where(np.arange(32) < 16, 255, 0 if transparent else 255) * np.ones((32, 1), int)
    hidden = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    rgb = np.where(np.arange(32)[:, None] < 16, [255, 0, 0], hidden)
    file, plain = BytesIO(), BytesIO()
    Image.fromarray(np.concatenate([rgb, alpha[..., None]], -1).astype(np.uint8)).save(file, "PNG")
    Image.fromarray(rgb.astype(np.uint8)).save(plain, "PNG")
    path = video_of_pngs(tmp_path / "a.avi", [file.getvalue()] * 3)
    found = all_frames(path, 16)
    assert probe_video(path).remarks == (ON_WHITE,)
    if transparent:
        assert (found[:, :, :7] == (255, 0, 0)).all()
        assert (found[:, :, 9:] == 255).all()
    else:
        assert np.array_equal(found, all_frames(video_of_pngs(tmp_path / "plain.avi", [plain.getvalue()] * 3), 16))
