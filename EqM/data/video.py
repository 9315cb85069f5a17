"""Video files through PyAV: checks a file, reads its frames, and writes new files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data.frames import Crops, check_aspect, pixel_aspect, remarks_about, shown_size
from data.untrusted import (
    MAX_FRAMES,
    File,
    Patience,
    Unreadable,
    open_video,
    packets_of,
    reading,
)
from runtime.files import write_whole
from runtime.size import ImageSize

# FFmpeg gives reordered frames of these codecs wrong times if the container, such as AVI, keeps no times.
TIMES_FROM_CONTAINER = {"h264", "hevc", "vvc"}

MIN_DECODED = 0.9  # share of a file's frames; some codecs have packets that show nothing
DECODED_SIDE = 16  # pixels


@dataclass(frozen=True)
class VideoInfo:
    """A file's frames: their times in the stream's unit, in display order, and how many a second.

    `times` is a range if frames are evenly spaced, which takes less memory.
    `seekable` is False if decoded frames do not carry these times (H.264 with B-frames in AVI).
    `seek_margin` is the longest time from a frame's decoding to its display, in the stream's unit. Seek to a frame's
    time less this margin: the seek then does not end behind the frame.
    `remarks` say what reading changes about its pictures. A data set counts them, and does not keep them by file.
    """

    times: range | tuple[int, ...]
    frames_per_second: float
    seekable: bool = True
    seek_margin: int = 0
    remarks: tuple[str, ...] = ()


def frames_of(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, patience: Patience
) -> Iterator[av.VideoFrame]:
    """Yields the stream's frames. Ends with FFmpeg's error at the first frame that does not decode."""
    for packet in packets_of(container, stream, patience):
        yield from packet.decode()


def first_frame(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, patience: Patience
) -> av.VideoFrame:
    """The first frame of a stream. Raises Unreadable if there is none."""
    frame = next(frames_of(container, stream, patience), None)
    if frame is None:
        raise Unreadable("it has no frames")
    return frame


@reading()
def probe_video(path: File) -> VideoInfo:
    """Counts a file's frames by reading its packets, not its header, and decodes the first one.

    Raises:
        Unreadable: it is not a video, its first frame does not decode, or it goes beyond a limit.
    """
    stamps: list[tuple[int | None, int | None]] = []
    patience = Patience()
    with open_video(path) as (container, stream):
        frame = first_frame(container, stream, patience)
        check_aspect(frame, pixel_aspect(stream))  # here, so that no run stops at it later
        codec = stream.codec_context
        untimed = codec.has_b_frames and codec.name in TIMES_FROM_CONTAINER
    with open_video(path) as (container, stream):
        for packet in packets_of(container, stream, patience):
            # The edit list of a cut .mp4 discards frames that the file still holds.
            if packet.size and not packet.is_discard:
                stamps.append((packet.pts, packet.dts))
            if len(stamps) > MAX_FRAMES:
                raise Unreadable(f"it has more than {MAX_FRAMES:,} frames: cut it into shorter files")
        time_base, header_rate = stream.time_base, stream.average_rate
    times = [dts if pts is None else pts for pts, dts in stamps]
    if not times or None in times:
        raise Unreadable("its frames carry no times")
    # If frames are reordered and the container keeps their times, the packets' times are unsorted.
    seekable = not (untimed and times == sorted(times))
    margin = max((pts - dts for pts, dts in stamps if None not in (pts, dts)), default=0)
    times = sorted(set(times))
    rate = float(header_rate or 0)
    if len(times) > 1:
        rate = (len(times) - 1) / float((times[-1] - times[0]) * time_base)
    if not rate:
        raise Unreadable("it has one frame and no frame rate")
    return VideoInfo(evenly_spaced(times), rate, seekable, max(margin, 0), remarks_about(frame))


@reading()
def video_size(path: File) -> tuple[int, int]:
    """Width and height of the first frame as it is shown, in square pixels.

    Raises:
        Unreadable: it is not a video, or its first frame does not decode.
    """
    with open_video(path) as (container, stream):
        return shown_size(first_frame(container, stream, Patience()), pixel_aspect(stream))


def evenly_spaced(times: list[int]) -> range | tuple[int, ...]:
    """The same times as a range, if they are an arithmetic progression."""
    step = times[1] - times[0] if len(times) > 1 else 1
    progression = range(times[0], times[0] + step * len(times), step)
    return progression if all(a == b for a, b in zip(times, progression, strict=True)) else tuple(times)


def read_frames(path: File, info: VideoInfo, indices: Sequence[int], size: ImageSize) -> np.ndarray:
    """Frames by ascending index, resized and centre-cropped: (T, H, W, 3) uint8.

    Seeks to the first frame and decodes to the last. If seeking fails, decodes from the start. If the file ends
    early, repeats the last frame found.

    Raises:
        Unreadable: none of the frames decodes.
    """
    times, patience = [info.times[i] for i in indices], Patience()
    try:
        frames = seek_and_decode(path, times, info.seek_margin, size, patience) if info.seekable else []
    except Unreadable:
        frames = []
    if not frames:
        frames = decode_from_start(path, indices, size, patience)
    if not frames:
        raise Unreadable("no frame decodes at the wanted place")
    return np.stack(frames + [frames[-1]] * (len(indices) - len(frames)))


@reading()
def seek_and_decode(
    path: File, times: Sequence[int], seek_margin: int, size: ImageSize, patience: Patience
) -> list[np.ndarray]:
    """The first frame at or after each time; an empty list if the seek ended behind the first time."""
    frames: list[np.ndarray] = []
    with open_video(path) as (container, stream):
        container.seek(times[0] - seek_margin, stream=stream)
        crop = Crops(stream, size)
        for i, frame in enumerate(frames_of(container, stream, patience)):
            if frame.pts is None or (i == 0 and frame.pts > times[0]):
                return []
            while len(frames) < len(times) and frame.pts >= times[len(frames)]:
                frames.append(crop(frame))
            if len(frames) == len(times):
                break
    return frames


def decode_from_start(path: File, indices: Sequence[int], size: ImageSize, patience: Patience) -> list[np.ndarray]:
    """The frames with these indices, found by counting decoded frames; fewer if the file ends or breaks early."""
    frames: list[np.ndarray] = []
    try:
        with reading(), open_video(path) as (container, stream):
            crop = Crops(stream, size)
            for i, frame in enumerate(frames_of(container, stream, patience)):
                while len(frames) < len(indices) and i >= indices[len(frames)]:
                    frames.append(crop(frame))
                if len(frames) == len(indices):
                    break
    except Unreadable:
        if not frames:
            raise
    return frames


def iterate_frames(path: File, info: VideoInfo, size: ImageSize) -> Iterator[np.ndarray]:
    """Yields all frames in display order, each (H, W, 3) uint8, the same as `read_frames` of one index gives.

    Decodes from the start and holds one frame at a time. Passes over packets that do not decode, and ends at a limit.

    Raises:
        Unreadable: no frame decodes.
    """
    shown, timed = 0, info.seekable
    patience = Patience()
    try:
        with reading(), open_video(path) as (container, stream):
            crop = Crops(stream, size)
            for i, frame in enumerate(decodable(container, stream, patience)):
                # As in `read_frames`: by time, or by count if the times are wrong.
                timed = timed and frame.pts is not None and (i > 0 or frame.pts <= info.times[0])
                while shown < len(info.times) and (frame.pts >= info.times[shown] if timed else i >= shown):
                    yield crop(frame)
                    patience.restart()
                    shown += 1
    except Unreadable:
        if not shown:
            raise
    if not shown:
        raise Unreadable("it has no frame that decodes")


def decode_video(path: File, info: VideoInfo) -> None:
    """Decodes all frames of a file, to find the damage that `probe_video` cannot see.

    Raises:
        Unreadable: a frame does not decode, or less than MIN_DECODED of those that `probe_video` counted are there.
    """
    frames, counted, patience = 0, len(info.times), Patience()
    try:
        with reading(), open_video(path) as (container, stream):
            crop = Crops(stream, DECODED_SIDE)
            for frame in frames_of(container, stream, patience):
                crop(frame)
                patience.restart()
                frames += 1
    except Unreadable as error:
        raise Unreadable(f"after {frames} of {counted} frames: {error}") from None
    if frames < MIN_DECODED * counted:
        raise Unreadable(f"only {frames} of {counted} frames decode")


def decodable(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, patience: Patience
) -> Iterator[av.VideoFrame]:
    """Yields the stream's frames. Passes over packets that do not decode."""
    for packet in packets_of(container, stream, patience):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        yield from frames


def write_video(path: Path, frames: np.ndarray, frames_per_second: float, lossless: bool = False) -> None:
    """Writes (T, H, W, 3) uint8 frames as H.264 in mp4 that common players show; H and W are even.

    With `lossless` it writes FFV1 in Matroska, which gives back the same pixels of any size. The file is written whole
    or not at all.

    Raises:
        OSError, av.FFmpegError: the disk is full or fails.
    """
    write_whole(path, lambda file: encode_video(file, frames, frames_per_second, lossless), durable=False)


def encode_video(path: Path, frames: np.ndarray, frames_per_second: float, lossless: bool) -> None:
    """`write_video`, in place."""
    with encoder(path, frames.shape[1:3], frames_per_second, lossless) as add:
        add(frames)


@contextmanager
def encoder(
    path: Path, size: tuple[int, int], frames_per_second: float, lossless: bool = False
) -> Iterator[Callable[[np.ndarray], None]]:
    """Within the block, a function adds frames (T, H, W, 3) uint8 of this height and width to a video, in place.

    Raises:
        OSError, av.FFmpegError: as `write_video`.
    """
    codec, layout, options = ("ffv1", "bgr0", {}) if lossless else ("libx264", "yuv420p", {"crf": "12"})
    with av.open(str(path), "w", format="matroska" if lossless else "mp4") as container:
        rate = Fraction(frames_per_second).limit_denominator(1001)
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = layout
        stream.thread_count = 1  # more threads take longer to start than a short clip takes to encode

        def add(frames: np.ndarray) -> None:
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

        yield add
        container.mux(stream.encode())
