"""Video files through PyAV: what a file holds, chosen frames of it, and new files."""

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

# Codecs whose reordered frames FFmpeg gives no right times where the container keeps none, as AVI.
TIMES_FROM_CONTAINER = {"h264", "hevc", "vvc"}


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


def frames_of(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, patience: Patience
) -> Iterator[av.VideoFrame]:
    """The stream's frames, while there is patience for them; ends with an error at the first that does not decode."""
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
            check_aspect(next(frames_of(container, stream, patience)))  # before a run is built on it
            codec = stream.codec_context
            untimed = codec.has_b_frames and codec.name in TIMES_FROM_CONTAINER
        container, stream = open_video(path)
        with container:
            for packet in packets_of(container, stream, patience):
                # An edit list, as of a cut .mp4, discards frames that the file still holds.
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
        for i, frame in enumerate(frames_of(container, stream, Patience())):
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
    """All frames in display order, each (size, size, 3) uint8, as `read_frames` gives them one by one.

    Decodes from the start, one frame in memory at a time. What does not decode is passed over, and a
    file that goes beyond a limit ends there.

    Raises:
        UnreadableVideo: before the first frame, where none decodes.
    """
    shown, timed = 0, info.seekable
    reformatter = VideoReformatter()
    patience = Patience()
    try:
        container, stream = open_video(path)
        with container:
            for i, frame in enumerate(decodable(container, stream, patience)):
                # The rules of the two ways to read: by time, or where times are wrong by count.
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
    """The frames of the packets that decode, while there is patience for them."""
    for packet in packets_of(container, stream, patience):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            continue
        yield from frames


def check_aspect(frame: av.VideoFrame) -> None:
    """Raises UnreadableVideo where a frame is too long and thin."""
    if is_long_and_thin(frame.width, frame.height):
        raise UnreadableVideo(f"a frame of {frame.width}x{frame.height} is over {MAX_ASPECT} times as long as wide")


def square(frame: av.VideoFrame, size: int, reformatter: VideoReformatter) -> np.ndarray:
    """A frame resized so that its short side is `size`, and its centre: (size, size, 3) uint8 RGB.

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


def write_video(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    """Writes (T, H, W, 3) uint8 frames, H and W even, as H.264 that common players show."""
    with av.open(str(path), "w") as container:
        rate = Fraction(frames_per_second).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # A short clip's encoder would spend most of its time on starting a thread and a half for each core.
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
