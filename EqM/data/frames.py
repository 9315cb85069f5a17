"""What one decoded frame of a video becomes: RGB pixels of one size."""

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from data.images import ON_WHITE, on_white
from data.untrusted import MAX_ASPECT, Unreadable, is_long_and_thin
from runtime.size import ImageSize, sides

DEINTERLACED = "marked as interlaced: frames with combs are deinterlaced"
# A block of so many pixels in square has a comb if its lines differ from the two beside them by so many levels more
# than by this ratio of what those two, which are of one field, differ from one another.
COMB_BLOCK, COMB_LEVELS, COMB_RATIO = 16, 8, 1.5


class Crops:
    """Brings the frames of one stream, or of none, to one size: each is resized until it just covers it, then cropped.

    Pixels that are not square are resized to square ones. A frame is turned as the file's display matrix says, and
    its centre is kept. Frames with combs are deinterlaced, and transparent parts are white.
    """

    def __init__(self, stream: av.video.stream.VideoStream | None, size: ImageSize):
        self.aspect, self.sides, self.reformatter = pixel_aspect(stream), sides(size), VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            Unreadable: as `check_aspect`.
        """
        check_aspect(frame, self.aspect)
        width, height = frame.width * self.aspect, frame.height
        stored = self.sides[::-1] if turns(frame)[0] else self.sides  # the frame is resized before it is turned
        scale = max(stored[0] / height, stored[1] / width)
        smooth = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
        plain = opaque(progressive(frame))
        target = round(width * scale), round(height * scale)
        pixels = self.reformatter.reformat(plain, *target, "rgb24", interpolation=smooth, threads=1).to_ndarray()
        pixels = turned(pixels, frame)
        top, left = ((side - wanted) // 2 for side, wanted in zip(pixels.shape[:2], self.sides, strict=True))
        return pixels[top : top + self.sides[0], left : left + self.sides[1]]


def pixel_aspect(stream: av.video.stream.VideoStream | None) -> float:
    """The width of a stored pixel over its height; 1 if the file does not say it, or there is no file."""
    return float((stream and stream.sample_aspect_ratio) or 1)


def shown_size(frame: av.VideoFrame, aspect: float) -> tuple[int, int]:
    """Width and height of a frame as it is shown, in square pixels.

    Args:
        aspect: of its pixels, as `pixel_aspect`.
    """
    size = round(frame.width * aspect), frame.height
    return size[::-1] if turns(frame)[0] else size


def check_aspect(frame: av.VideoFrame, aspect: float) -> None:
    """Raises Unreadable if a frame, of pixels of this aspect, is shown too long and thin."""
    if is_long_and_thin(frame.width * aspect, frame.height):
        width, height = round(frame.width * aspect), frame.height
        raise Unreadable(f"a frame of {width}x{height} is over {MAX_ASPECT} times as long as wide")


def remarks_about(frame: av.VideoFrame) -> tuple[str, ...]:
    """What `Crops` changes about frames like this one, and people may want to know."""
    remarks = {DEINTERLACED: frame.interlaced_frame, ON_WHITE: may_be_transparent(frame)}
    return tuple(remark for remark, holds in remarks.items() if holds)


def turns(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether a frame is to be transposed and, after that, mirrored in x and in y, to the nearest quarter turn.

    Its display matrix sends the pixel (x, y) to (a·x + c·y, b·x + d·y); ISO/IEC 14496-12, section 8.3.2.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def turned(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Pixels (H, W, 3) of a frame as the file wants them shown: (H, W, 3), or (W, H, 3)."""
    transposed, mirrored_x, mirrored_y = turns(frame)
    if transposed:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if mirrored_y else 1, :: -1 if mirrored_x else 1]


def may_be_transparent(frame: av.VideoFrame) -> bool:
    """Whether a frame's format has room for transparency."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def opaque(frame: av.VideoFrame) -> av.VideoFrame:
    """The same frame, on white if parts of it are transparent."""
    if not may_be_transparent(frame):
        return frame
    pixels = frame.to_ndarray(format="rgba")  # (H, W, 4)
    if pixels[..., 3].min() == 255:
        return frame
    return av.VideoFrame.from_ndarray(np.asarray(on_white(Image.fromarray(pixels))), format="rgb24")


def progressive(frame: av.VideoFrame) -> av.VideoFrame:
    """The same frame without the mark of interlace: FFmpeg would scale its fields one by one.

    A frame with combs goes through FFmpeg's estdif first, which keeps the upper field, and interpolates the lines of
    the other. It looks at one frame alone, so that a frame is the same wherever decoding began.
    """
    if not frame.interlaced_frame:
        return frame
    graph = av.filter.Graph()
    if hasattr(graph, "threads"):  # not in PyAV 17
        graph.threads = 1  # starting more takes longer than a frame
    last = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    deinterlace = [("estdif", "mode=frame:parity=tff:deint=all")] if has_combs(frame.to_ndarray(format="gray")) else []
    for name, options in (*deinterlace, ("setfield", "prog"), ("buffersink", None)):
        step = graph.add(name, options)
        last.link_to(step)
        last = step
    graph.configure()
    graph.push(frame)
    graph.push(None)
    return graph.pull()


def has_combs(grey: np.ndarray) -> bool:
    """Whether some block of a frame (H, W) uint8 shows two moments in its odd and its even lines."""
    height, width = ((side // COMB_BLOCK * COMB_BLOCK) for side in (grey.shape[0] - 2, grey.shape[1]))
    if height <= 0 or not width:
        return False
    lines = grey[: height + 2, :width].astype(np.int16)
    above, below = lines[:-2], lines[2:]
    blocks = (height // COMB_BLOCK, COMB_BLOCK, width // COMB_BLOCK, COMB_BLOCK)
    between_fields = np.abs(2 * lines[1:-1] - above - below).reshape(blocks).mean((1, 3)) / 2
    within_field = np.abs(above - below).reshape(blocks).mean((1, 3))
    return bool((between_fields > COMB_RATIO * within_field + COMB_LEVELS).any())
