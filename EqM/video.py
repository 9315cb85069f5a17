"""Video files through PyAV: what a file holds, chosen frames of it, and new files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

# FFmpeg gives up on a file that blocks for longer: seconds to open, seconds for one read.
TIMEOUT_S = (10.0, 10.0)
# Codecs whose reordered frames FFmpeg gives no right times where the container keeps none, as AVI.
TIMES_FROM_CONTAINER = {"h264", "hevc", "vvc"}


class UnreadableVideo(Exception):
    """No frame could be decoded; the text says why."""


@dataclass(frozen=True)
class VideoInfo:
    """A file's frames: their times in the stream's unit, in display order, and how many a second.

    `times` is a range where frames are evenly spaced, which keeps large sets small in memory.
    `seekable` is False where decoded frames do not carry these times (H.264 with B-frames in AVI).
    `seek_margin`, in the stream's unit, is how far a frame is shown after its place in the file's
    order: a seek so much earlier than a frame's time does not end behind it.
    """

    times: range | tuple[int, ...]
    frames_per_second: float
    seekable: bool = True
    seek_margin: int = 0


def open_video(path: Path) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    """Opens a file's first video stream, to decode in one thread."""
    container = av.open(str(path), metadata_errors="ignore", timeout=TIMEOUT_S)
    if not container.streams.video:
        container.close()
        raise UnreadableVideo("it has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise UnreadableVideo("its codec is not known")
    stream.codec_context.thread_count = 1
    return container, stream


def probe_video(path: Path) -> VideoInfo:
    """Counts a file's frames by reading its packets, not its header, and decodes the first one.

    Raises:
        UnreadableVideo: it is not a video, or its first frame does not decode.
    """
    try:
        container, stream = open_video(path)
        with container:
            next(container.decode(stream))
            codec = stream.codec_context
            untimed = codec.has_b_frames and codec.name in TIMES_FROM_CONTAINER
        container, stream = open_video(path)
        with container:
            # An edit list, as of a cut .mp4, discards frames that the file still holds.
            shown = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
            stamps = [(packet.pts, packet.dts) for packet in shown]
            time_base, header_rate = stream.time_base, stream.average_rate
    except StopIteration:
        raise UnreadableVideo("it has no frames") from None
    except av.error.FFmpegError as error:
        raise UnreadableVideo(describe(error)) from None
    times = [dts if pts is None else pts for pts, dts in stamps]
    if not times or None in times:
        raise UnreadableVideo("its frames carry no times")
    # Frames that come out of order have packets whose times do too, if the container knows them.
    seekable = not (untimed and times == sorted(times))
    margin = max((pts - dts for pts, dts in stamps if None not in (pts, dts)), default=0)
    times = sorted(set(times))
    rate = float(header_rate or 0)
    if len(times) > 1:
        rate = (len(times) - 1) / float((times[-1] - times[0]) * time_base)
    if not rate:
        raise UnreadableVideo("it has one frame and no frame rate")
    return VideoInfo(evenly_spaced(times), rate, seekable, max(margin, 0))


def describe(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def evenly_spaced(times: list[int]) -> range | tuple[int, ...]:
    """The same times as a range, if they are an arithmetic progression."""
    step = times[1] - times[0] if len(times) > 1 else 1
    progression = range(times[0], times[0] + step * len(times), step)
    return progression if all(a == b for a, b in zip(times, progression, strict=True)) else tuple(times)


def read_frames(path: Path, info: VideoInfo, indices: Sequence[int], size: int) -> np.ndarray:
    """Frames by index, ascending, centre-cropped and resized: (T, size, size, 3) uint8.

    Seeks to the first one and decodes no further than the last; where seeking fails, decodes
    from the start. Where the file ends early, the last frame found is held.

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
    """The first frames at or after each time; none at all where the seek went past the first."""
    frames: list[np.ndarray] = []
    reformatter = VideoReformatter()
    container, stream = open_video(path)
    with container:
        container.seek(times[0] - seek_margin, stream=stream)
        for i, frame in enumerate(container.decode(stream)):
            if frame.pts is None or (i == 0 and frame.pts > times[0]):
                return []
            while len(frames) < len(times) and frame.pts >= times[len(frames)]:
                frames.append(square(frame, size, reformatter))
            if len(frames) == len(times):
                break
    return frames


def decode_from_start(path: Path, indices: Sequence[int], size: int) -> list[np.ndarray]:
    """The frames with these indices, counted as they are decoded."""
    frames: list[np.ndarray] = []
    reformatter = VideoReformatter()
    try:
        container, stream = open_video(path)
        with container:
            for i, frame in enumerate(container.decode(stream)):
                while len(frames) < len(indices) and i >= indices[len(frames)]:
                    frames.append(square(frame, size, reformatter))
                if len(frames) == len(indices):
                    break
    except av.error.FFmpegError as error:
        if not frames:
            raise UnreadableVideo(describe(error)) from None
    return frames


def iterate_frames(path: Path, info: VideoInfo, size: int) -> Iterator[np.ndarray]:
    """All frames in display order, each (size, size, 3) uint8, as `read_frames` gives them one by one.

    Decodes from the start, one frame in memory at a time. What does not decode is passed over.

    Raises:
        UnreadableVideo: before the first frame, where none decodes.
    """
    shown, timed = 0, info.seekable
    reformatter = VideoReformatter()
    try:
        container, stream = open_video(path)
        with container:
            for i, frame in enumerate(decodable(container, stream)):
                # The rules of the two ways to read: by time, or where times are wrong by count.
                timed = timed and frame.pts is not None and (i > 0 or frame.pts <= info.times[0])
                while shown < len(info.times) and (frame.pts >= info.times[shown] if timed else i >= shown):
                    yield square(frame, size, reformatter)
                    shown += 1
    except av.error.FFmpegError as error:
        if not shown:
            raise UnreadableVideo(describe(error)) from None
    if not shown:
        raise UnreadableVideo("it has no frame that decodes")


def decodable(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of the packets that decode."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        yield from frames


def square(frame: av.VideoFrame, size: int, reformatter: VideoReformatter) -> np.ndarray:
    """A frame resized so that its short side is `size`, and its centre: (size, size, 3) uint8 RGB."""
    scale = size / min(frame.height, frame.width)
    height, width = round(frame.height * scale), round(frame.width * scale)
    smooth = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    pixels = reformatter.reformat(frame, width, height, "rgb24", interpolation=smooth, threads=1).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def write_video(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    """Writes (T, H, W, 3) uint8 frames, H and W even, as H.264 that common players show."""
    with av.open(str(path), "w") as container:
        rate = Fraction(frames_per_second).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
