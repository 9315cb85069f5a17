"""Files that are damaged or made to do harm: skipped with a reason, in bounded memory and time."""

import json
import os
import struct
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, run_command, run_script
from data import untrusted, video
from data.clips import read_image
from data.images import IMAGE_FORMATS, probe_image
from data.untrusted import VIDEO_FORMATS, Unreadable
from data.video import iterate_frames, probe_video, read_frames
from test_video import H264, LEVELS, encode, encode_kind, grey, mux

REPORT_MEMORY = """
import sys
from runs.record import process_memory_gb
from data.untrusted import Unreadable
from data.video import probe_video
before = process_memory_gb()
try:
    probe_video(sys.argv[1])
except Unreadable as error:
    print("unreadable", error, file=sys.stderr)
print((process_memory_gb() - before) * 1e9 / 2**20)
"""


def png(width: int, height: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def video_of_pngs(path: Path, pictures: list[bytes], streams: int = 1) -> Path:
    """An .avi whose frames need not be of the size that its header says."""
    with av.open(str(path), "w") as container:
        all_streams = [container.add_stream("png", rate=25) for _ in range(streams)]
        for stream in all_streams:
            stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        for i, picture in enumerate(pictures):
            for stream in all_streams:
                packet = av.Packet(picture)
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 25)
                packet.is_keyframe = True
                container.mux(packet)
    return path


def claims_frames(path: Path, count: int) -> Path:
    """An .mp4 of 40 frames whose header claims `count` frames of 10 bytes each."""
    data = bytearray(encode(path, "libx264", grey(LEVELS), H264).read_bytes())
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 10, count)
    struct.pack_into(">III", data, data.index(b"stsc") + 12, 1, count, 1)
    struct.pack_into(">III", data, data.index(b"stts") + 8, 1, count, 512)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("flags", [["--video"], []], ids=["videos", "images"])
def test_pipes_and_devices_among_the_files_are_skipped_and_named(shapes, tmp_path, flags):
    folder, suffix = tmp_path / "data" / "A", ".avi" if flags else ".png"
    folder.mkdir(parents=True)
    os.mkfifo(folder / f"pipe{suffix}")
    (folder / f"zeros{suffix}").symlink_to("/dev/zero")
    (folder / f"good{suffix}").write_bytes(next(shapes.glob("*/*.avi")).read_bytes() if flags else png(16, 16))
    result = run_script("check_data.py", tmp_path / "data", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "  A: 1" in result.stdout.splitlines()
    assert "unreadable files: 2" in result.stdout
    assert result.stdout.count("pipe or a device") == 2


def test_a_pipe_in_the_place_of_a_scanned_file_is_unreadable(tmp_path):
    path = encode_kind(tmp_path, "mpeg4.avi")
    info = probe_video(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Unreadable, match="pipe"):
        read_frames(path, info, [0, 3], 16)


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile mpeg4.avi\nfile mpeg4.avi\n",
        "ffconcat version 1.0\nfile list.avi\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nmpeg4.avi\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90\n",
    ],
    ids=["other files", "itself", "HLS", "a network address"],
)
def test_a_list_of_other_files_or_addresses_is_not_followed(tmp_path, playlist):
    encode_kind(tmp_path, "mpeg4.avi")
    (tmp_path / "list.avi").write_text(playlist)
    with pytest.raises(Unreadable, match=r"is no avi|Invalid data"):
        probe_video(tmp_path / "list.avi")


def test_a_file_named_like_an_address_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("http:") / "a.avi"
    path.parent.mkdir()
    encode_kind(tmp_path, "mpeg4.avi").rename(path)
    info = probe_video(path)
    assert read_frames(path, info, [0, 3], 16).shape == (2, 16, 16, 3)


@pytest.mark.parametrize("count", [1_000_000, 3_000_000, 60_000_000])
def test_a_header_that_claims_millions_of_frames_takes_little_memory(tmp_path, count):
    path = claims_frames(tmp_path / "a.mp4", count)
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'EqM')!r})\n{REPORT_MEMORY}"
    result = run_command(sys.executable, "-c", code, path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("unreadable")
    assert float(result.stdout) < 500  # MiB; without bounds 70 bytes for each frame claimed


@pytest.mark.parametrize("codec", [b"FMP4", b"DIB ", b"H264"])
def test_a_header_that_claims_huge_frames_is_read_by_its_frames_or_skipped(tmp_path, codec):
    path = encode_kind(tmp_path, "mpeg4.avi")
    data = bytearray(path.read_bytes().replace(b"FMP4", codec))
    header = data.index(b"strf") + 8
    struct.pack_into("<ii", data, header + 4, 100_000, 100_000)
    path.write_bytes(data)
    if codec == b"FMP4":
        assert read_frames(path, probe_video(path), [0, 3], 16).shape == (2, 16, 16, 3)
    else:
        with pytest.raises(Unreadable):
            probe_video(path)


def test_frames_of_too_many_pixels_are_not_decoded(tmp_path):
    large = png(4112, 4112)
    with pytest.raises(Unreadable, match="pixels a frame"):
        probe_video(video_of_pngs(tmp_path / "all.avi", [large] * 3))
    path = video_of_pngs(tmp_path / "later.avi", [png(32, 32)] * 5 + [large] * 3)
    info = probe_video(path)
    assert len(info.times) == 8
    assert read_frames(path, info, [0, 4], 16).shape == (2, 16, 16, 3)
    with pytest.raises(Unreadable, match="pixels a frame"):
        read_frames(path, info, [6, 7], 16)
    largest = video_of_pngs(tmp_path / "largest.avi", [png(4096, 4096)])
    assert read_frames(largest, probe_video(largest), [0], 16).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(("width", "height"), [(4000, 100), (100, 4000)])
def test_long_and_thin_frames_are_not_resized(tmp_path, width, height):
    with pytest.raises(Unreadable, match=f"{width}x{height}"):
        probe_video(video_of_pngs(tmp_path / "all.avi", [png(width, height)] * 2))
    path = video_of_pngs(tmp_path / "later.avi", [png(32, 32)] + [png(width, height)] * 2)
    info = probe_video(path)
    with pytest.raises(Unreadable, match=f"{width}x{height}"):
        read_frames(path, info, [1, 2], 16)
    assert len(list(iterate_frames(path, info, 16))) == 1  # a pack keeps what comes before


def test_a_file_of_too_many_frames_is_refused_with_advice(tmp_path, monkeypatch):
    path = encode_kind(tmp_path, "mpeg4.avi")
    monkeypatch.setattr(video, "MAX_FRAMES", 40)
    assert len(probe_video(path).times) == 40
    monkeypatch.setattr(video, "MAX_FRAMES", 39)
    with pytest.raises(Unreadable, match="more than 39 frames: cut it"):
        probe_video(path)


def test_a_file_of_too_many_streams_is_refused(tmp_path):
    with pytest.raises(Unreadable, match="over 32 streams"):
        probe_video(video_of_pngs(tmp_path / "a.avi", [png(32, 32)] * 2, streams=40))
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25) for _ in range(40)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for stream in streams:
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
            container.mux(stream.encode())
    with pytest.raises(Unreadable, match="32 or more streams|over 32 streams"):
        probe_video(tmp_path / "a.mkv")


@pytest.mark.parametrize("name", ["mpeg4.avi", "h264.avi"])
def test_a_file_that_computes_for_long_without_a_wanted_frame_is_given_up(tmp_path, monkeypatch, name):
    path = encode_kind(tmp_path, name)
    info = probe_video(path)
    monkeypatch.setattr(untrusted, "MAX_COMPUTING_S", 0.0)
    for read in (
        lambda: probe_video(path),
        lambda: read_frames(path, info, [30], 16),
        lambda: list(iterate_frames(path, info, 16)),
    ):
        with pytest.raises(Unreadable, match="computing"):
            read()


def test_what_is_done_with_the_frames_of_a_file_does_not_count_as_reading_it(tmp_path, monkeypatch):
    path = encode_kind(tmp_path, "mpeg4.avi")
    info = probe_video(path)
    monkeypatch.setattr(untrusted, "MAX_COMPUTING_S", 0.2)
    frames = 0
    for _ in iterate_frames(path, info, 16):
        frames += 1
        if frames in (10, 20):
            end = time.thread_time() + 0.3
            while time.thread_time() < end:
                pass
    assert frames == 40


def test_a_picture_that_pillow_would_give_to_a_program_is_unreadable(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n{} loop\n%%EOF\n")
    for read in (lambda: probe_image(str(path)), lambda: read_image(str(path), 16)):
        with pytest.raises(Unreadable, match="cannot identify"):
            read()


def test_long_and_thin_images_and_images_of_very_many_pixels_are_unreadable(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (33, 1)).save(path)
    for read in (lambda: probe_image(str(path)), lambda: read_image(str(path), 16)):
        with pytest.raises(Unreadable, match="33x1"):
            read()
    Image.new("1", (14_000, 14_000)).save(path)
    for read in (lambda: probe_image(str(path)), lambda: read_image(str(path), 16)):
        with pytest.raises(Unreadable, match="decompression bomb"):
            read()


def random_bytes(data: bytearray, rng: np.random.Generator) -> bytes:
    near = len(data) if rng.random() < 0.5 else 2000  # the header's, for half of them
    for place in rng.integers(min(near, len(data)), size=rng.integers(1, 200)):
        data[place] = rng.integers(256)
    return bytes(data)


def cut(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: rng.integers(len(data))])


def zeros(data: bytearray, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(len(data), size=2))
    data[start:end] = bytes(end - start)
    return bytes(data)


def shuffled_blocks(data: bytearray, rng: np.random.Generator) -> bytes:
    size = 2 ** rng.integers(4, 13)
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    for a, b in rng.integers(len(blocks), size=(rng.integers(1, 20), 2)):
        blocks[a], blocks[b] = blocks[b], blocks[a]
    return b"".join(blocks)


def large_numbers(data: bytearray, rng: np.random.Generator) -> bytes:
    for place in rng.integers(min(2000, len(data) - 4), size=rng.integers(1, 8)):
        data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
    return bytes(data)


DAMAGES: list[Callable[[bytearray, np.random.Generator], bytes]] = [
    random_bytes,
    cut,
    zeros,
    shuffled_blocks,
    large_numbers,
]


def other_kinds(folder: Path) -> list[Path]:
    """Clips of other containers than the sets' .avi."""
    names = ("h264.mp4", "h264.mkv", "vp9.webm", "h264.avi")
    return [encode_kind(folder, name) for name in names]


@pytest.mark.slow
def test_a_thousand_damaged_clips_among_ten_thousand_are_skipped_and_counted(shapes, tmp_path, request):
    """Nothing crashes or hangs, and a run's count is of those files that one by one cannot be read."""
    clips = request.getfixturevalue("real_clips") if "EQM_REAL_CLIPS" in os.environ else shapes
    sources = tmp_path / "sources"
    sources.mkdir()
    originals = sorted(clips.glob("*/*.avi"))[:8] + other_kinds(sources)
    good, bad = tmp_path / "set" / "good", tmp_path / "set" / "bad"
    good.mkdir(parents=True)
    bad.mkdir()
    copies = [sources / f"copy{i}{path.suffix}" for i, path in enumerate(originals)]
    for path, copy in zip(originals, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    for i in range(10_000):
        copy = copies[i % len(copies)]
        os.link(copy, good / f"{i}{copy.suffix}")
    for i in range(1000):
        rng, copy = np.random.default_rng(i), copies[i % len(copies)]
        (bad / f"{i}{copy.suffix}").write_bytes(DAMAGES[i % len(DAMAGES)](bytearray(copy.read_bytes()), rng))

    environment = ["env", f"PYTHONPATH={ROOT / 'EqM'}"]
    script = ROOT / "tests" / "read_everything.py"
    result = run_command(*environment, sys.executable, script, tmp_path / "set", "bad", cwd=tmp_path, timeout_s=400)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["files"] == 11_000
    assert report["memory_gb"] < 2
    skipped = {path for paths in report["met"].values() for path in paths}
    scanned = set(report["scanned"])
    assert report["counted"] == len(scanned | skipped) > 100
    assert all(Path(path).parent == bad for path in scanned | skipped)
    for path in bad.iterdir():
        try:
            probe_video(path)
            readable = True
        except Unreadable:
            readable = False
        assert readable == (str(path) not in scanned)
    assert skipped.isdisjoint(scanned)
    assert sorted(report["met"]) == sorted(report["alone"])
    assert all(asked in paths for asked, paths in report["met"].items())
    assert report["alone"]


def image_sources(folder: Path) -> list[Path]:
    """An image, or several, of each format that is accepted, in the modes that are read in ways of their own."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 4), np.uint8)
    colour, alpha = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    deep, exif = Image.fromarray(noise[..., 0].astype(np.uint16) * 257), Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (name, colour, {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "TIFF") else {}) for name in IMAGE_FORMATS
    ]
    kinds += [("JPEG", colour.convert("CMYK"), {}), ("JPEG", colour, {"progressive": True})]
    kinds += [("PNG", image, {}) for image in (alpha, deep)]
    kinds += [("PNG", colour.convert("P"), {"transparency": bytes(range(99))}), ("WEBP", alpha, {"lossless": True})]
    kinds += [("TIFF", alpha, {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits")]
    kinds += [("TIFF", colour, {"compression": "jpeg"}), ("TIFF", colour.convert("F").point(lambda v: v / 255), {})]
    kinds += [("PPM", deep, {}), ("BMP", colour.convert("P"), {})]
    kinds += [("GIF", colour, {"save_all": True, "append_images": [colour] * 3, "transparency": 3})]
    paths = [folder / f"{i}.image" for i in range(len(kinds))]
    for path, (name, image, options) in zip(paths, kinds, strict=True):
        image.save(path, name, **options)
    return paths


def video_sources(folder: Path) -> list[Path]:
    """A video, or several, of each container that is accepted."""
    pictures = [np.random.default_rng(i).integers(0, 256, (32, 48, 3), np.uint8) for i in range(3)] * 4
    codecs = {"a.mpg": "mpeg2video", "a.ts": "mpeg2video", "a.wmv": "wmv2", "a.flv": "flv", "a.3gp": "mpeg4"}
    paths = [encode(folder / name, codec, pictures, {}) for name, codec in codecs.items()]
    interlaced = H264 | {"x264-params": "tff=1"}
    paths += [encode(folder / "interlaced.mp4", "libx264", pictures, interlaced)]
    paths += [
        encode(folder / name, codec, pictures, {}, "rgba") for name, codec in (("a.mov", "png"), ("a.avi", "png"))
    ]
    paths += [mux(folder / name, ["sound", "frames", "video"], pictures) for name in ("b.mp4", "b.mkv")]
    if "gif" in VIDEO_FORMATS:
        paths += [folder / "a.gif"]
        Image.fromarray(pictures[0]).save(paths[-1], save_all=True, append_images=map(Image.fromarray, pictures[1:]))
    return [*paths, *other_kinds(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(("sources", "each"), [(image_sources, 200), (video_sources, 40)], ids=["images", "videos"])
def test_damaged_files_of_every_format_are_read_or_unreadable_in_bounded_time_and_memory(tmp_path, sources, each):
    (tmp_path / "whole").mkdir()
    (tmp_path / "damaged").mkdir()
    whole = sources(tmp_path / "whole")
    for number, path in enumerate(whole):
        for i in range(each):
            rng = np.random.default_rng((number, i))
            damaged = DAMAGES[i % len(DAMAGES)](bytearray(path.read_bytes()), rng)
            (tmp_path / "damaged" / f"{number}-{i}{path.suffix}").write_bytes(damaged)
    environment = ["env", f"PYTHONPATH={ROOT / 'EqM'}"]
    for folder in ("whole", "damaged"):
        command = [*environment, sys.executable, ROOT / "tests" / "read_damaged.py", tmp_path / folder]
        result = run_command(*command, cwd=tmp_path, timeout_s=300)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        report = json.loads(result.stdout)
        assert report["errors"] == {}
        assert report["slowest_s"] < 10
        assert report["memory_gb"] < 1
        assert report["unreadable"] == 0 if folder == "whole" else each < report["unreadable"] < each * len(whole)
