"""Opens files that may be damaged or made to do harm, within limits of memory and time."""

import ctypes
import errno
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
from av.stream import Disposition
from PIL import Image

# FFmpeg gives up on a file that blocks for longer: seconds to open, seconds for one read.
TIMEOUT_S = (10.0, 10.0)
# Seconds that reading may compute until the next wanted frame. They are the thread's processor time: a slow disk or
# a busy machine does not make a file unreadable.
MAX_COMPUTING_S = 60.0
# Frames of a file: 11 hours at 25 a second. Uneven times take about 40 bytes a frame.
MAX_FRAMES = 1_000_000
# Pixels of a video's frame; 4K has 8.8 million. A decoder may hold 17 frames of 1.5 to 8 bytes a pixel. Images have
# Pillow's own limit.
MAX_PIXELS = 4096 * 4096
# A picture's long side over its short side. The long side is resized in proportion, and cropped only then.
MAX_ASPECT = 32
MAX_STREAMS = 32  # FFmpeg may decode a part of each when it opens a file
# Bytes that FFmpeg may allocate at once. For an .mp4 it allocates an index as long as the header claims.
MAX_ALLOCATION = 2**27
# Bytes of a file inside an archive. Each packing process holds one in memory.
MAX_MEMBER = 2**30
# FFmpeg's names for the formats of files with VIDEO_EXTENSIONS. FFmpeg's playlists (concat, hls) would open other
# files and addresses, and some of its other readers never end.
VIDEO_FORMATS = "avi,matroska,mov,asf,flv,mpeg,mpegts,ogg,gif"


class Unreadable(Exception):
    """A video or an image cannot be read. The text says why, in one line."""


@contextmanager
def reading() -> Iterator[None]:
    """Around what PyAV and Pillow do with a file, or as a decorator: any error of theirs means an unreadable file.

    On damaged files both raise nearly all of Python's errors. MemoryError stays, because other files meet it too; only
    FFmpeg's own is the file's.

    Raises:
        Unreadable: in place of the error.
    """
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not isinstance(error, av.error.FFmpegError):
            raise
        raise Unreadable(describe(error)) from error


@dataclass(frozen=True)
class Contents:
    """The contents of a file inside an archive. Readers take them in place of a path.

    Attributes:
        name: the file's name. FFmpeg looks at its ending where the contents could be of several formats.
    """

    name: str
    data: bytes

    def open(self) -> io.BytesIO:
        """A file in memory."""
        file = io.BytesIO(self.data)
        file.name = f"file:{self.name}"
        return file


File = str | Path | Contents  # what a reader opens


class Patience:
    """Limits what reading a file computes: MAX_COMPUTING_S from the start, and again from every wanted frame."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.end = time.thread_time() + MAX_COMPUTING_S

    def check(self) -> None:
        """Raises Unreadable if the time is used up."""
        if time.thread_time() > self.end:
            raise Unreadable(f"it takes more than {MAX_COMPUTING_S:g} s of computing to come to a frame")


def check_regular_file(path: File) -> None:
    """Raises Unreadable for a folder, a pipe (it may wait for its other end) or a device (it may never end)."""
    if not isinstance(path, Contents) and Path(path).exists() and not Path(path).is_file():
        raise Unreadable("it is a directory, a pipe or a device, not a file")


@cache
def limit_ffmpeg_memory() -> None:
    """Limits each allocation of FFmpeg in this process to MAX_ALLOCATION bytes.

    PyAV lacks this function, but the library inside it has it. A PyAV that is built in another way has no such limit.
    """
    limit = getattr(ctypes.CDLL(av.frame.__file__), "av_max_alloc", None)
    if limit:
        limit.argtypes, limit.restype = [ctypes.c_size_t], None
        limit(MAX_ALLOCATION)


@contextmanager
def open_video(path: File) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """A file's first video stream of a known codec, to decode in one thread. To be used inside `reading`.

    A picture that is attached to the file, such as a cover, does not count.

    Raises:
        Unreadable: it is not a file, has too many streams, or has no such stream.
        av.error.FFmpegError: it cannot be opened.
    """
    limit_ffmpeg_memory()  # here, so that no reader forgets it
    check_regular_file(path)
    limits = {"format_whitelist": VIDEO_FORMATS, "max_streams": str(MAX_STREAMS), "max_pixels": str(MAX_PIXELS)}
    # Without "file:", a file named http:a.avi would be taken for an address.
    file = path.open() if isinstance(path, Contents) else f"file:{path}"
    with av.open(file, metadata_errors="ignore", timeout=TIMEOUT_S, options=limits) as container:
        if len(container.streams) >= MAX_STREAMS:  # FFmpeg has left out the rest
            raise Unreadable(f"it has {MAX_STREAMS} or more streams")
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        known = [s for s in videos if s.codec_context]
        if not known:
            raise Unreadable("its codec is not known" if videos else "it has no video stream")
        stream = known[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def packets_of(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, patience: Patience
) -> Iterator[av.Packet]:
    """Yields the stream's packets, and at the end the empty one. Packets of other streams take patience too."""
    for packet in container.demux():
        patience.check()
        if packet.stream.index == stream.index:  # the empty packet's own index is 0
            yield packet


def describe(error: Exception) -> str:
    """The reason of an error, in one line."""
    if isinstance(error, av.error.ExitError):
        return f"reading it takes more than {max(TIMEOUT_S):g} s"
    if isinstance(error, av.error.ArgumentError):
        return f"it is damaged, has over {MAX_PIXELS:,} pixels a frame, or is no {VIDEO_FORMATS.replace(',', ', ')}"
    if isinstance(error, av.error.MemoryError):
        return f"it asks for more than {MAX_ALLOCATION // 2**20} MiB at once, or has over {MAX_STREAMS} streams"
    if isinstance(error, av.error.FFmpegError | OSError | ValueError | SyntaxError | Image.DecompressionBombError):
        words = (getattr(error, "strerror", None) or str(error)).split()  # written for people
    else:
        words = ["it is damaged:", type(error).__name__, *str(error).split()]
    return " ".join(words) or type(error).__name__


def may_pass(error: Unreadable) -> bool:
    """Whether a file may be read later as it is: the system refused it, as without a permission, or it took long."""
    cause = error.__cause__
    if isinstance(cause, av.error.ArgumentError | av.error.MemoryError):  # these are about what the file holds
        return False
    return isinstance(cause, av.error.ExitError) or getattr(cause, "errno", None) in errno.errorcode


def is_long_and_thin(width: int, height: int) -> bool:
    """Whether a picture's long side is over MAX_ASPECT times its short side."""
    return max(width, height) > MAX_ASPECT * min(width, height)
