"""Video files through PyAV: checks a file, reads its frames, and writes new files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from data.untrusted import (
    MAX_ASPECT,
    MAX_FRAMES,
    Patience,
    UnreadableVideo,
    describe,
    is_long_and_thin,
    open_video,
    packets_of,
)
from runtime.files import write_whole

# FFmpeg gives reordered frames of these codecs wrong times if the container, such as AVI, keeps no times.
TIMES_FROM_CONTAINER = {"h264", "hevc", "vvc"}


@dataclass(frozen=True)
class VideoInfo:
    """A file's frames: their times in the stream's unit, in display order, and how many a second.

    `times` is a range if frames are evenly spaced, which takes less memory.
    `seekable` is False if decoded frames do not carry these times (H.264 with B-frames in AVI).
    `seek_margin` is the longest time from a frame's decoding to its display, in the stream's unit. Seek to a frame's
    time less this margin: the seek then does not end behind the frame.
    """

    times: range | tuple[int, ...]
    frames_per_second: float
    seekable: bool = True
    seek_margin: int = 0


def frames_of(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, patience: Patience
) -> Iterator[av.VideoFrame]:
    """Yields the stream's frames. Ends with FFmpeg's error at the first frame that does not decode."""
    for packet in packets_of(container, stream, patience):
        yield from packet.decode()


def probe_video(path: Path) -> VideoInfo:
    """Counts a file's frames by reading its packets, not its header, and decodes the first one.

    Raises:
        UnreadableVideo: it is not a video, its first frame does not decode, or it goes beyond a limit.
    """
    stamps: list[tuple[int | None, int | None]] = []
    patience = Patience()
    try:
        container, stream = open_video(path)
        with container:
            check_aspect(next(frames_of(container, stream, patience)))  # here, so that no run stops at it later
            codec = stream.codec_context
            untimed = codec.has_b_frames and codec.name in TIMES_FROM_CONTAINER
        container, stream = open_video(path)
        with container:
            for packet in packets_of(container, stream, patience):
                # The edit list of a cut .mp4 discards frames that the file still holds.
                if packet.size and not packet.is_discard:
                    stamps.append((packet.pts, packet.dts))
                if len(stamps) > MAX_FRAMES:
                    raise UnreadableVideo(f"it has more than {MAX_FRAMES:,} frames: cut it into shorter files")
            time_base, header_rate = stream.time_base, stream.average_rate
    except StopIteration:
        raise UnreadableVideo("it has no frames") from None
    except av.error.FFmpegError as error:
        raise UnreadableVideo(describe(error)) from None
    times = [dts if pts is None else pts for pts, dts in stamps]
    if not times or None in times:
        raise UnreadableVideo("its frames carry no times")
    # If frames are reordered and the container keeps their times, the packets' times are unsorted.
    seekable = not (untimed and times == sorted(times))
    margin = max((pts - dts for pts, dts in stamps if None not in (pts, dts)), default=0)
    times = sorted(set(times))
    rate = float(header_rate or 0)
    if len(times) > 1:
        rate = (len(times) - 1) / float((times[-1] - times[0]) * time_base)
    if not rate:
        raise UnreadableVideo("it has one frame and no frame rate")
    return VideoInfo(evenly_spaced(times), rate, seekable, max(margin, 0))


def evenly_spaced(times: list[int]) -> range | tuple[int, ...]:
    """The same times as a range, if they are an arithmetic progression."""
    step = times[1] - times[0] if len(times) > 1 else 1
    progression = range(times[0], times[0] + step * len(times), step)
    return progression if all(a == b for a, b in zip(times, progression, strict=True)) else tuple(times)


def read_frames(path: Path, info: VideoInfo, indices: Sequence[int], size: int) -> np.ndarray:
    """Frames by ascending index, resized and centre-cropped: (T, size, size, 3) uint8.

    Seeks to the first frame and decodes to the last. If seeking fails, decodes from the start. If the file ends
    early, repeats the last frame found.

    Raises:
        UnreadableVideo: none of the frames decodes.
    """
    try:
        times = [info.times[i] for i in indices]
        frames = seek_and_decode(path, times, info.seek_margin, size) if info.seekable else []
    except av.error.FFmpegError:
        frames = []
    if not frames:
        frames = decode_from_start(path, indices, size)
    if not frames:
        raise UnreadableVideo("no frame decodes at the wanted place")
    return np.stack(frames + [frames[-1]] * (len(indices) - len(frames)))


def seek_and_decode(path: Path, times: Sequence[int], seek_margin: int, size: int) -> list[np.ndarray]:
    """The first frame at or after each time; an empty list if the seek ended behind the first time."""
    frames: list[np.ndarray] = []
    reformatter = VideoReformatter()
    container, stream = open_video(path)
    with container:
        container.seek(times[0] - seek_margin, stream=stream)
        for i, frame in enumerate(frames_of(container, stream, Patience())):
            if frame.pts is None or (i == 0 and frame.pts > times[0]):
                return []
            while len(frames) < len(times) and frame.pts >= times[len(frames)]:
                frames.append(square(frame, size, reformatter))
            if len(frames) == len(times):
                break
    return frames


def decode_from_start(path: Path, indices: Sequence[int], size: int) -> list[np.ndarray]:
    """The frames with these indices, found by counting decoded frames; fewer if the file ends or breaks early."""
    frames: list[np.ndarray] = []
    reformatter = VideoReformatter()
    try:
        container, stream = open_video(path)
        with container:
            for i, frame in enumerate(frames_of(container, stream, Patience())):
                while len(frames) < len(indices) and i >= indices[len(frames)]:
                    frames.append(square(frame, size, reformatter))
                if len(frames) == len(indices):
                    break
    except av.error.FFmpegError as error:
        if not frames:
            raise UnreadableVideo(describe(error)) from None
    return frames


def iterate_frames(path: Path, info: VideoInfo, size: int) -> Iterator[np.ndarray]:
    """Yields all frames in display order, each (size, size, 3) uint8, the same as `read_frames` of one index gives.

    Decodes from the start and holds one frame at a time. Passes over packets that do not decode, and ends at a limit.

    Raises:
        UnreadableVideo: no frame decodes.
    """
    shown, timed = 0, info.seekable
    reformatter = VideoReformatter()
    patience = Patience()
    try:
        container, stream = open_video(path)
        with container:
            for i, frame in enumerate(decodable(container, stream, patience)):
                # As in `read_frames`: by time, or by count if the times are wrong.
                timed = timed and frame.pts is not None and (i > 0 or frame.pts <= info.times[0])
                while shown < len(info.times) and (frame.pts >= info.times[shown] if timed else i >= shown):
                    yield square(frame, size, reformatter)
                    patience.restart()
                    shown += 1
    except (av.error.FFmpegError, UnreadableVideo) as error:
        if not shown:
            raise UnreadableVideo(describe(error)) from None
    if not shown:
        raise UnreadableVideo("it has no frame that decodes")


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


def check_aspect(frame: av.VideoFrame) -> None:
    """Raises UnreadableVideo if a frame is too long and thin."""
    if is_long_and_thin(frame.width, frame.height):
        raise UnreadableVideo(f"a frame of {frame.width}x{frame.height} is over {MAX_ASPECT} times as long as wide")


def square(frame: av.VideoFrame, size: int, reformatter: VideoReformatter) -> np.ndarray:
    """The centre square of a frame whose short side is resized to `size`: (size, size, 3) uint8 RGB.

    Raises:
        UnreadableVideo: as `check_aspect`.
    """
    check_aspect(frame)
    scale = size / min(frame.height, frame.width)
    height, width = round(frame.height * scale), round(frame.width * scale)
    smooth = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    pixels = reformatter.reformat(frame, width, height, "rgb24", interpolation=smooth, threads=1).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


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
    codec, layout, options = ("ffv1", "bgr0", {}) if lossless else ("libx264", "yuv420p", {"crf": "12"})
    with av.open(str(path), "w", format="matroska" if lossless else "mp4") as container:
        rate = Fraction(frames_per_second).limit_denominator(1001)
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = layout
        stream.thread_count = 1  # more threads take longer to start than a short clip takes to encode
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
