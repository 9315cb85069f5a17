from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from data import video
from data.untrusted import Unreadable
from data.video import iterate_frames, probe_video, read_frames, write_video

# A frame's grey level tells which one it is; neighbours differ much, so that coding does not blur them together.
LEVELS = [10 + 6 * (17 * i % 40) for i in range(40)]
# Key frames every 12, so that most places are between two of them.
H264 = {"g": "12", "bf": "3", "crf": "10", "x264-params": "b-adapt=0:scenecut=0"}
OPEN_GOP = H264 | {"x264-params": "b-adapt=0:scenecut=0:open-gop=1"}
VP9 = {"g": "12", "crf": "10", "b": "0", "deadline": "good", "cpu-used": "8", "lag-in-frames": "16"}
KINDS = {
    "mpeg4.avi": ("mpeg4", {"qmin": "2", "qmax": "2", "g": "12", "sc_threshold": "1000000000"}),
    "h264.mp4": ("libx264", H264),
    "h264.mkv": ("libx264", H264),
    "h264.mov": ("libx264", H264),
    "open-gop.mp4": ("libx264", OPEN_GOP),
    "open-gop.mkv": ("libx264", OPEN_GOP),
    "h264.avi": ("libx264", H264),
    "vp9.webm": ("libvpx-vp9", VP9),
}


def encode(
    path: Path,
    codec: str,
    frames: Sequence[np.ndarray],
    options: dict[str, str],
    pix_fmt: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    shift: int = 0,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Writes RGB frames at 25 a second, or at the given times; all of them `shift` frames earlier."""
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt) for frame in frames]
        for i, picture in enumerate(pictures):
            picture.pts = times_ms[i] if times_ms else i
            picture.time_base = Fraction(1, 1000) if times_ms else Fraction(1, 25)
        for picture in [*pictures, None]:
            for packet in stream.encode(picture):
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                container.mux(packet)
    return path


def grey(levels: Sequence[int], height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), level, np.uint8) for level in levels]


def encode_kind(folder: Path, name: str) -> Path:
    codec, options = KINDS[name]
    return encode(folder / name, codec, grey(LEVELS), options)


def levels_at(path: Path, places: Sequence[int]) -> list[float]:
    return list(read_frames(path, probe_video(path), places, 16).mean(axis=(1, 2, 3)))


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The times of the frames that `video` decodes from now on."""
    times: list[int] = []
    frames_of = video.frames_of

    def counted(*arguments):
        for frame in frames_of(*arguments):
            times.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "frames_of", counted)
    return times


def test_lossless_frames_come_back_as_they_were_rendered(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.avi", "ffv1", frames, {"g": "10"}, pix_fmt="bgr0")
    info = probe_video(path)
    for places in ([0, 1, 2], [7, 10, 13, 16], [29], [3, 3, 28]):
        assert np.array_equal(read_frames(path, info, places, 32), frames[places])


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_found_from_any_start(tmp_path, name):
    path = encode_kind(tmp_path, name)
    info = probe_video(path)
    assert len(info.times) == len(LEVELS)
    assert info.frames_per_second == pytest.approx(25)
    for start in range(len(LEVELS) - 6):
        places = [start, start + 3, start + 6]
        found = read_frames(path, info, places, 16).mean(axis=(1, 2, 3))
        assert found == pytest.approx([LEVELS[i] for i in places], abs=2)


def test_b_frames_of_mpeg_4_in_avi_are_the_ones_that_decoding_from_the_start_gives(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    frames = [np.roll(picture, i, axis=1) for i in range(40)]
    path = encode(tmp_path / "a.avi", "mpeg4", frames, {"qmin": "3", "qmax": "3", "g": "12", "bf": "2"})
    info = probe_video(path)
    sought = [read_frames(path, info, [i], 32)[0] for i in range(40)]
    monkeypatch.setattr(video, "seek_and_decode", lambda *arguments: None)
    assert np.array_equal(sought, read_frames(path, info, range(40), 32))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "h264.avi"])
def test_only_the_frames_from_the_key_frame_to_the_last_wanted_are_decoded(tmp_path, decoded, name):
    path = encode_kind(tmp_path, name)
    info = probe_video(path)
    for start in (26, 30, 35):
        decoded.clear()
        read_frames(path, info, [start, start + 2], 16)
        assert decoded[-1] == info.times[start + 2]
        # The key frame before lies at most 12 frames back, or 24 where it is shown after its place in the file.
        assert len(decoded) <= 3 + (24 if info.seek_margin else 12)
        assert len(decoded) < start


def test_h264_with_b_frames_in_avi_is_decoded_from_the_start_to_the_last_wanted(tmp_path, decoded):
    path = encode_kind(tmp_path, "h264.avi")
    info = probe_video(path)
    assert not info.seekable
    decoded.clear()
    read_frames(path, info, [5, 9], 16)
    assert len(decoded) == 10


def mux(path: Path, kinds: Sequence[str], frames: Sequence[np.ndarray]) -> Path:
    """Writes streams: the frames, with B-frames, and sound, covers or another video."""
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono")
    sound.rate = 8000
    pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
    codecs = {
        "frames": ("libx264", "yuv420p", pictures),
        "cover": ("png", "rgb24", pictures[:1]),
        "video": ("mpeg4", "yuv420p", pictures[::2]),
        "sound": ("aac" if path.suffix == ".mp4" else "pcm_s16le", None, [sound]),
    }
    with av.open(str(path), "w") as container:
        streams = []
        for kind in kinds:
            codec, layout, contents = codecs[kind]
            stream = container.add_stream(codec, rate=25 if layout else 8000, options=H264 if kind == "frames" else {})
            if layout:
                stream.height, stream.width = frames[0].shape[:2]
                stream.pix_fmt = layout
            if kind == "cover":
                stream.disposition = Disposition.attached_pic.value
            streams.append((stream, contents))
        for stream, contents in streams:
            for content in (*contents, None):
                container.mux(stream.encode(content))
    return path


WITH_SOUND = [
    (streams, kind) for streams in ("sound frames", "sound frames video") for kind in (".mkv", ".avi", ".mov")
]
WITH_COVERS = [(streams, ".mp4") for streams in ("sound frames", "cover frames", "cover sound frames sound video")]


@pytest.mark.parametrize(("streams", "kind"), WITH_SOUND + WITH_COVERS)
@pytest.mark.parametrize("count", [1, 40])
def test_all_frames_are_read_whatever_else_the_file_holds(tmp_path, kind, streams, count):
    streams = streams.split()
    frames = moving(count)
    path, alone = mux(tmp_path / f"a{kind}", streams, frames), mux(tmp_path / f"alone{kind}", ["frames"], frames)
    info = probe_video(path)
    assert len(info.times) == count
    right = read_frames(alone, probe_video(alone), range(count), 32)
    assert np.array_equal(list(iterate_frames(path, info, 32)), right)
    for start in range(0, count, 7):
        places = range(start, min(start + 4, count))
        assert np.array_equal(read_frames(path, info, places, 32), right[places.start : places.stop])


def test_a_seek_that_fails_ends_at_the_right_frames(tmp_path, monkeypatch):
    path = encode_kind(tmp_path, "mpeg4.avi")
    info = probe_video(path)
    for failure in (Unreadable("no index"), None):

        def seek_and_decode(*arguments, failure=failure):
            if failure:
                raise failure

        monkeypatch.setattr(video, "seek_and_decode", seek_and_decode)
        found = read_frames(path, info, [11, 30], 16).mean(axis=(1, 2, 3))
        assert found == pytest.approx([LEVELS[11], LEVELS[30]], abs=2)


@pytest.mark.parametrize("name", ["mpeg4.avi", "h264.mkv", "h264.avi"])
def test_a_file_that_ends_early_holds_its_last_frame(tmp_path, name):
    path = encode_kind(tmp_path, name)
    info = probe_video(path)
    shorter = encode(tmp_path / f"short-{name}", KINDS[name][0], grey(LEVELS[:30]), KINDS[name][1])
    found = read_frames(shorter, info, [27, 29, 31, 33], 16).mean(axis=(1, 2, 3))
    assert found == pytest.approx([LEVELS[27], LEVELS[29], LEVELS[29], LEVELS[29]], abs=2)


def test_no_frame_at_the_wanted_place_is_unreadable(tmp_path):
    info = probe_video(encode_kind(tmp_path, "mpeg4.avi"))
    shorter = encode(tmp_path / "short.avi", "mpeg4", grey(LEVELS[:4]), {})
    with pytest.raises(Unreadable, match="wanted place"):
        read_frames(shorter, info, [36, 38], 16)


def test_frames_count_and_rate_come_from_the_file_not_from_its_header(tmp_path):
    path = encode_kind(tmp_path, "mpeg4.avi")
    data = bytearray(path.read_bytes())
    total = data.index(b"avih") + 8 + 16  # dwTotalFrames of the main header
    length = data.index(b"strh") + 8 + 32  # dwLength of the stream's
    for place in (total, length):
        assert int.from_bytes(data[place : place + 4], "little") == len(LEVELS)
        data[place : place + 4] = (999).to_bytes(4, "little")
    path.write_bytes(data)
    info = probe_video(path)
    assert (len(info.times), info.frames_per_second) == (40, 25)


def test_frame_times_may_be_uneven(tmp_path):
    times = np.cumsum([0, *[20, 60] * 19, 20]).tolist()
    path = encode(tmp_path / "a.mkv", "libx264", grey(LEVELS), H264, times_ms=times)
    info = probe_video(path)
    assert list(info.times) == times
    assert info.frames_per_second == pytest.approx(39 / (times[-1] / 1000))
    for start in range(0, 36, 5):
        found = read_frames(path, info, [start, start + 3], 16).mean(axis=(1, 2, 3))
        assert found == pytest.approx([LEVELS[start], LEVELS[start + 3]], abs=2)


def test_even_frame_times_take_no_memory_for_each(tmp_path):
    assert isinstance(probe_video(encode_kind(tmp_path, "h264.mp4")).times, range)


def test_frames_that_an_edit_list_cuts_away_are_not_counted(tmp_path):
    options = {"g": "50", "bf": "0", "crf": "10", "x264-params": "scenecut=0"}
    path = encode(tmp_path / "cut.mp4", "libx264", grey(LEVELS), options, shift=10)
    assert len(probe_video(path).times) == 30
    assert levels_at(path, [0, 5, 29]) == pytest.approx([LEVELS[10], LEVELS[15], LEVELS[39]], abs=2)


def test_the_first_frame_alone_is_enough(tmp_path):
    path = encode(tmp_path / "a.avi", "mpeg4", grey([100]), {})
    info = probe_video(path)
    assert (len(info.times), info.frames_per_second) == (1, 25)
    assert levels_at(path, [0, 0]) == pytest.approx([100, 100], abs=2)


def test_metadata_that_is_not_utf_8_does_no_harm(tmp_path):
    path = encode(tmp_path / "a.avi", "mpeg4", grey(LEVELS), {}, metadata={"title": "xxxxxxxx"})
    data = path.read_bytes()
    assert data.count(b"xxxxxxxx") == 1
    path.write_bytes(data.replace(b"xxxxxxxx", b"\xff\xfe\xe9xxxxx"))
    assert len(probe_video(path).times) == len(LEVELS)


@pytest.mark.parametrize(("height", "width"), [(32, 96), (96, 32), (50, 70), (8, 16), (32, 32)])
def test_the_centre_is_cropped_and_proportions_are_kept(tmp_path, height, width):
    """Red left of the middle and green right of it; a blue strip at both long ends, which the crop cuts away."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : width // 2] = (255, 0, 0)
    frame[:, width // 2 :] = (0, 255, 0)
    long_side = frame if width > height else frame.transpose(1, 0, 2)
    strip = max((max(height, width) - min(height, width)) // 2 - 2, 0)
    long_side[:, :strip] = long_side[:, long_side.shape[1] - strip :] = (0, 0, 255)
    path = encode(tmp_path / "a.avi", "ffv1", [frame], {}, pix_fmt="bgr0")
    (picture,) = read_frames(path, probe_video(path), [0], 16)
    assert picture.shape == (16, 16, 3)
    inner = picture[3:-3]
    assert np.allclose(inner[:, 3:6], (255, 0, 0), atol=12)
    assert np.allclose(inner[:, 10:13], (0, 255, 0), atol=12)
    assert picture[..., 2].mean() < 10


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda whole: b"this is a text\n" * 99, "Invalid data"),
        (lambda whole: b"", "Invalid data"),
        (lambda whole: whole[:100], "Invalid data"),
        (lambda whole: whole[: whole.index(b"movi")], "."),
        (lambda whole: np.random.default_rng(0).bytes(5000), "Invalid data"),
        (lambda whole: whole.replace(b"FMP4", b"ZZZZ"), "codec"),
    ],
    ids=["text", "empty", "truncated header", "header alone", "noise", "unknown codec"],
)
def test_what_holds_no_video_is_unreadable_with_a_reason(tmp_path, content, reason):
    path = encode_kind(tmp_path, "mpeg4.avi")
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(Unreadable, match=reason):
        probe_video(path)


def test_a_missing_file_a_folder_and_sound_alone_are_unreadable_with_a_reason(tmp_path):
    with av.open(str(tmp_path / "sound.avi"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (tmp_path / "folder.avi").mkdir()
    for name, reason in (("gone.avi", "No such file"), ("folder.avi", "directory"), ("sound.avi", "no video stream")):
        with pytest.raises(Unreadable, match=reason):
            probe_video(tmp_path / name)


def test_a_file_that_breaks_after_the_scan_is_unreadable(tmp_path):
    path = encode_kind(tmp_path, "mpeg4.avi")
    info = probe_video(path)
    path.write_bytes(b"gone bad" * 99)
    with pytest.raises(Unreadable, match="Invalid data"):
        read_frames(path, info, [0, 3], 16)
    path.unlink()
    with pytest.raises(Unreadable, match="No such file"):
        read_frames(path, info, [0, 3], 16)


def test_a_cut_file_gives_the_frames_that_it_still_has(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.avi", "mpeg4", frames, {"qmin": "2", "qmax": "2", "g": "12"})
    whole = read_frames(path, probe_video(path), range(40), 32)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10])
    info = probe_video(path)
    assert 5 < len(info.times) < 35
    assert np.array_equal(read_frames(path, info, range(5), 32), whole[:5])


def moving(count: int = 40) -> list[np.ndarray]:
    """Frames that all differ, in more than their level."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    return [np.roll(picture, (i // 32, i), axis=(0, 1)) for i in range(count)]


def encode_uneven(path: Path) -> Path:
    times = np.cumsum([0, *[20, 60] * 19, 20]).tolist()
    return encode(path.with_suffix(".mkv"), "libx264", moving(), H264, times_ms=times)


OTHER_KINDS = {
    "B-frames": lambda path: encode(path, "mpeg4", moving(), {"qmin": "3", "qmax": "3", "g": "12", "bf": "2"}),
    "uneven times": encode_uneven,
    "edit list": lambda path: encode(path.with_suffix(".mp4"), "libx264", moving(), {"g": "50", "bf": "0"}, shift=10),
    "one frame": lambda path: encode(path, "mpeg4", moving(1), {}),
    "lossless": lambda path: encode(path, "ffv1", moving(), {"g": "10"}, pix_fmt="bgr0"),
    "wide": lambda path: encode(path, "mpeg4", [np.tile(frame, (1, 3, 1)) for frame in moving()], {"g": "12"}),
}


@pytest.mark.parametrize("name", [*KINDS, *OTHER_KINDS])
def test_frames_one_by_one_are_those_that_are_read_by_index(tmp_path, name):
    path = OTHER_KINDS[name](tmp_path / "a.avi") if name in OTHER_KINDS else encode_kind(tmp_path, name)
    info = probe_video(path)
    frames = list(iterate_frames(path, info, 16))
    assert len(frames) == len(info.times)
    assert np.array_equal(frames, read_frames(path, info, range(len(frames)), 16))
    assert len(np.unique(frames, axis=0)) == len(frames)


@pytest.mark.parametrize("name", KINDS)
def test_frames_one_by_one_end_where_the_file_ends_early(tmp_path, name):
    path = encode_kind(tmp_path, name)
    info = probe_video(path)
    shorter = encode(tmp_path / f"short-{name}", KINDS[name][0], grey(LEVELS[:30]), KINDS[name][1])
    frames = list(iterate_frames(shorter, info, 16))
    assert len(frames) == 30
    assert np.array_equal(frames, read_frames(shorter, info, range(30), 16))


def test_frames_one_by_one_of_a_cut_file_are_those_that_it_still_has(tmp_path):
    path = encode(tmp_path / "a.avi", "mpeg4", moving(), {"qmin": "2", "qmax": "2", "g": "12"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10])
    info = probe_video(path)
    frames = list(iterate_frames(path, info, 16))
    assert len(info.times) - 1 <= len(frames) < 40
    assert np.array_equal(frames, read_frames(path, info, range(len(frames)), 16))


def test_a_broken_packet_is_passed_over_and_costs_one_frame(tmp_path):
    path = encode(tmp_path / "a.avi", "mpeg4", moving(), {"qmin": "2", "qmax": "2", "g": "12"})
    data = bytearray(path.read_bytes())
    packets = [i for i in range(len(data)) if data[i : i + 4] == b"00dc"]
    data[packets[15] + 8 : packets[16]] = bytes(packets[16] - packets[15] - 8)
    path.write_bytes(data)
    info = probe_video(path)
    frames = list(iterate_frames(path, info, 16))
    assert len(frames) == len(info.times) == 40
    broken = []
    for i in range(40):
        try:
            assert np.array_equal(frames[i], read_frames(path, info, [i], 16)[0]), i
        except Unreadable:
            broken.append(i)
    assert broken == list(range(14, 24))  # up to the next key frame
    assert np.array_equal(frames[14], frames[15])
    assert len(np.unique(frames, axis=0)) == 39


@pytest.mark.parametrize("rate", [25, 8.333333, 29.97, 10 / 3])
def test_a_written_video_has_the_frames_and_the_rate_asked_for(tmp_path, rate):
    frames = np.stack(grey(LEVELS[:5], 32, 48))
    write_video(tmp_path / "a.mp4", frames, rate)
    info = probe_video(tmp_path / "a.mp4")
    assert len(info.times) == 5
    assert info.frames_per_second == pytest.approx(rate, rel=1e-3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(rate, rel=1e-3)
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert pictures.shape == frames.shape
    assert np.abs(pictures.astype(int) - frames).max() <= 3


def test_a_video_of_one_frame_can_be_written(tmp_path):
    write_video(tmp_path / "a.mp4", np.stack(grey([90], 16, 16)), 8.0)
    assert len(probe_video(tmp_path / "a.mp4").times) == 1
