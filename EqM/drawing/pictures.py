"""Pictures of samples for people: a contact sheet, PNG and GIF files. Arrays are uint8 RGB."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.errors import shown
from runtime.files import write_whole

FRAME_SIDE = 64  # pixels that a frame's long side is magnified to, at least
SHEET_FRAMES = 8  # frames of a clip that the sheet shows, evenly spread
MAX_WIDTH = 1200  # pixels
MARGIN, CAPTION_HEIGHT = 8, 16  # pixels


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes (H, W, 3), whole or not at all. Raises OSError."""
    write_whole(path, lambda temporary: Image.fromarray(image).save(temporary, "PNG"), durable=False)


def read_png(path: Path) -> np.ndarray:
    """Reads (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def gif(frames: np.ndarray, frames_per_second: float) -> bytes:
    """(T, H, W, 3) as an endless GIF, whose frame times come in hundredths of a second."""
    images, file = [Image.fromarray(frame) for frame in frames], io.BytesIO()
    duration_ms = round(1000 / frames_per_second)
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=duration_ms, loop=0)
    return file.getvalue()


def write_gif(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    """Writes (T, H, W, 3) as `gif` makes it, whole or not at all. Raises OSError."""
    write_whole(path, lambda temporary: temporary.write_bytes(gif(frames, frames_per_second)), durable=False)


def contact_sheet(clips: Sequence[np.ndarray], captions: Sequence[str], above: Sequence[np.ndarray] = ()) -> np.ndarray:
    """One picture (H, W, 3) of all clips, each (T, h, w, 3): its frames side by side under its caption.

    Args:
        above: clips of this height and width that are shown above the others, one for each; or none.
    """
    strips = [filmstrip(clip) for clip in clips]
    if above:
        strips = [stacked(filmstrip(upper), lower) for upper, lower in zip(above, strips, strict=True)]
    height, width = strips[0].shape[:2]
    width += MARGIN
    height += MARGIN + CAPTION_HEIGHT
    columns = max(1, min(len(strips), MAX_WIDTH // width))
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (strip, caption) in enumerate(zip(strips, captions, strict=True)):
        left, top = MARGIN + i % columns * width, MARGIN + i // columns * height
        draw.text((left, top), shown(caption), fill="black", font=ImageFont.load_default(11))
        sheet.paste(Image.fromarray(strip), (left, top + CAPTION_HEIGHT))
    return np.asarray(sheet)


def stacked(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """One picture (H, W, 3) above another (h, w, 3), both from the left, with a white line between."""
    width = max(upper.shape[1], lower.shape[1])
    wide = [np.pad(each, ((0, 2), (0, width - each.shape[1]), (0, 0)), constant_values=255) for each in (upper, lower)]
    return np.concatenate(wide)


def shown_places(frames: int) -> list[int]:
    """The frames that a filmstrip shows of so many, evenly spread."""
    return np.linspace(0, frames - 1, min(frames, SHEET_FRAMES)).round().astype(int).tolist()


def filmstrip(clip: np.ndarray) -> np.ndarray:
    """(T, h, w, 3) → some of its frames side by side, whole pixels magnified so that small ones can be seen."""
    places = shown_places(len(clip))
    zoom = max(1, -(-FRAME_SIDE // max(clip.shape[1:3])))
    frames = clip[places].repeat(zoom, axis=1).repeat(zoom, axis=2)
    return np.concatenate(list(np.pad(frames, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)), axis=1)
