"""Opens files that may be damaged or made to do harm: what they take of memory and time is bounded."""

import ctypes
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import av
from PIL import Image

# FFmpeg gives up on a file that blocks for longer: seconds to open, seconds for one read.
TIMEOUT_S = (10.0, 10.0)
# The longest that one look into a file computes without coming to a wanted frame, in seconds of the
# thread's processor time: a slow disk or a busy machine does not make a file unreadable.
MAX_COMPUTING_S = 60.0
# A file with more is not read: 11 hours at 25 a second. Uneven times take some 40 bytes a frame.
MAX_FRAMES = 1_000_000
# 4K video has 8.8 million. A decoder may hold 17 such frames of 1.5 to 8 bytes a pixel. Images, which are
# held once, have Pillow's own limit.
MAX_PIXELS = 4096 * 4096
# A side of a picture over the other: its long side is resized in proportion before it is cropped.
MAX_ASPECT = 32
MAX_STREAMS = 32  # FFmpeg may decode some of each when it opens a file
# Bytes that FFmpeg may take at once. Its index of an .mp4 is as long as the header claims the file to be.
MAX_ALLOCATION = 2**27
# FFmpeg's names of what files with VIDEO_EXTENSIONS hold in practice. Its playlists, as concat and hls, open
# other files and addresses, and some of its other readers never end.
VIDEO_FORMATS = "avi,matroska,mov,asf,flv,mpeg,mpegts,ogg"
# What files of torchvision's IMG_EXTENSIONS hold in practice. Pillow hands others, as EPS, to programs.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class UnreadableVideo(Exception):
    """No frame could be decoded; the text says why."""


class Patience:
    """What a look into a file may still compute, MAX_COMPUTING_S from the start and from every wanted frame."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.end = time.thread_time() + MAX_COMPUTING_S

    def check(self) -> None:
        """Raises UnreadableVideo where it is used up."""
        if time.thread_time() > self.end:
            raise UnreadableVideo(f"it takes more than {MAX_COMPUTING_S:g} s of computing to come to a frame")


def refuse_what_is_no_file(path: str | Path) -> None:
    """Raises ValueError for a pipe, which waits for its other end, and a device, which may have no end."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is a directory, a pipe or a device, not a file")


@cache
def limit_ffmpeg_memory() -> None:
    """Limits what FFmpeg may allocate at once, in this whole process, to MAX_ALLOCATION bytes.

    PyAV does not have this function, but the library inside it does. A PyAV that is built in another way goes without.
    """
    limit = getattr(ctypes.CDLL(av.frame.__file__), "av_max_alloc", None)
    if limit:
        limit.argtypes, limit.restype = [ctypes.c_size_t], None
        limit(MAX_ALLOCATION)


def open_video(path: Path) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
    """Opens a file's first video stream, to decode in one thread.

    Raises:
        UnreadableVideo: it is no file, has too many streams, or holds no video of a known codec.
        av.error.FFmpegError: it cannot be opened.
    """
    limit_ffmpeg_memory()  # no reader can forget it
    try:
        refuse_what_is_no_file(path)
    except ValueError as error:
        raise UnreadableVideo(str(error)) from None
    limits = {"format_whitelist": VIDEO_FORMATS, "max_streams": str(MAX_STREAMS), "max_pixels": str(MAX_PIXELS)}
    # With the protocol no name of a file, as http:a.avi, is taken for an address.
    container = av.open(f"file:{path}", metadata_errors="ignore", timeout=TIMEOUT_S, options=limits)
    if len(container.streams) >= MAX_STREAMS:  # FFmpeg has left out the rest
        container.close()
        raise UnreadableVideo(f"it has {MAX_STREAMS} or more streams")
    if not container.streams.video:
        container.close()
        raise UnreadableVideo("it has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        container.close()
        raise UnreadableVideo("its codec is not known")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return container, stream


def packets_of(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, patience: Patience
) -> Iterator[av.Packet]:
    """The stream's packets, while there is patience for them and for those of other streams between."""
    for packet in container.demux():
        patience.check()
        if packet.stream_index == stream.index:
            yield packet


def describe(error: Exception) -> str:
    """The reason in a few words."""
    if isinstance(error, av.error.ExitError):
        return f"reading it takes more than {max(TIMEOUT_S):g} s"
    if isinstance(error, av.error.ArgumentError):
        return f"it is damaged, has over {MAX_PIXELS:,} pixels a frame, or is no {VIDEO_FORMATS.replace(',', ', ')}"
    if isinstance(error, av.error.MemoryError):
        return f"it asks for more than {MAX_ALLOCATION // 2**20} MiB at once, or has over {MAX_STREAMS} streams"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def is_long_and_thin(width: int, height: int) -> bool:
    """Whether a picture, resized so that its short side fits, could take much memory."""
    return max(width, height) > MAX_ASPECT * min(width, height)


def open_image(path: str) -> Image.Image:
    """An image of the known formats, its pixels not read yet; to be closed by the caller.

    Raises:
        ValueError: it is no file, or too long and thin.
        OSError, Image.DecompressionBombError, and what else Pillow's readers raise: it cannot be opened.
    """
    refuse_what_is_no_file(path)
    image = Image.open(path, formats=IMAGE_FORMATS)
    if is_long_and_thin(*image.size):
        image.close()
        raise ValueError(f"its {image.width}x{image.height} pixels are over {MAX_ASPECT} times as long as wide")
    return image
