"""Image files through Pillow: checks a file, and reads its pixels upright, in 8 bits, and on white."""

import ctypes
import logging
import warnings
from functools import cache

import numpy as np
from PIL import ExifTags, Image, features

from data.untrusted import MAX_ASPECT, Contents, File, Unreadable, check_regular_file, is_long_and_thin, reading

# The formats of files with IMAGE_EXTENSIONS. Pillow would hand some others, such as EPS, to programs.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
if "avif" in features.modules and features.check("avif"):  # not every Pillow has it
    IMAGE_FORMATS += ("AVIF",)
ON_WHITE = "transparent parts are put on white"
# What makes a picture upright, by its orientation in EXIF (CIPA DC-008, tag 274).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE = 258  # a tag of TIFF


@cache
def silence_pillow() -> None:
    """Keeps what Pillow says about files off this process's terminal. What matters is an error, and a reason."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # libtiff inside Pillow prints its errors. A Pillow that is built in another way may lack this function.
    set_handler = getattr(ctypes.CDLL(Image.core.__file__), "TIFFSetErrorHandler", None)
    if set_handler:
        set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        set_handler(None)


def open_image(path: File) -> Image.Image:
    """Opens an image of IMAGE_FORMATS, but does not read its pixels. The caller closes it, and is `reading`.

    Raises:
        Unreadable: it is not a file, or too long and thin.
        Exception: Pillow cannot open it.
    """
    silence_pillow()  # here, so that no reader forgets it
    check_regular_file(path)
    image = Image.open(path.open() if isinstance(path, Contents) else path, formats=IMAGE_FORMATS)
    if is_long_and_thin(*image.size):
        image.close()
        raise Unreadable(f"its {image.width}x{image.height} pixels are over {MAX_ASPECT} times as long as wide")
    return image


@reading()
def image_size(path: File) -> tuple[int, int]:
    """Width and height of the upright image in pixels, from the file's header.

    Raises:
        Unreadable: it has no header that Pillow can read.
    """
    with open_image(path) as image:
        # Pillow gives the upright size of a TIFF by itself.
        return image.size[::-1] if orientation(image) > 4 and image.format != "TIFF" else image.size


@reading()
def probe_image(path: File) -> tuple[str, ...]:
    """Checks an image's header and checksums without decoding it. Returns remarks about how it is read.

    Raises:
        Unreadable: it is not a whole image, or goes beyond a limit.
    """
    with open_image(path) as image:
        remarks, rare = (ON_WHITE,) if image.has_transparency_data else (), image.mode in ("I", "F")
        image.verify()
    if rare:  # their values decide
        decode_image(path)
    return remarks


@reading()
def decode_image(path: File) -> Image.Image:
    """An image's pixels in mode RGB, upright, and on white where they are transparent.

    Raises:
        Unreadable: they cannot be decoded, or their range is not known.
    """
    with open_image(path) as image:
        image.load()
        turn = TURNS.get(orientation(image))
        in_8_bits = scaled(image) if image.mode == "F" or image.mode.startswith("I") else image
        return on_white(in_8_bits if turn is None else in_8_bits.transpose(turn))


def orientation(image: Image.Image) -> int:
    """An image's orientation in EXIF, from 1, upright, to 8. Also 1 if the EXIF is damaged."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # PNG's own getexif decodes the image
    except Exception:
        return 1


def scaled(image: Image.Image) -> Image.Image:
    """A grey image of 16-bit integers, or of floats from 0 to 1, in mode L.

    Raises:
        Unreadable: its values are other integers, or floats outside that range.
    """
    values, key = np.asarray(image), image.info.get("transparency")  # (H, W)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # which Pillow scales to 16 bits
        raise Unreadable("its integers are signed or have 32 bits, and their range is not known: save it in 8 bits")
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also for NaN
            found = f"from {values.min():g} to {values.max():g}"
            raise Unreadable(f"its floats go {found}, outside [0, 1]: save it in 8 bits")
        peak = 1
    else:
        peak = 2 ** (image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16) - 1
    pixels = np.rint(np.multiply(values, 255 / peak, dtype=np.float32)).astype(np.uint8)
    if key is not None:
        pixels[values == key] = 255  # the colour of PNG that is transparent
    return Image.fromarray(pixels)


def on_white(image: Image.Image) -> Image.Image:
    """An image in mode RGB. Where it is transparent, white shows, and never the colour that the file hides there."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of a PNG of 16 bits, whose pixels Pillow has reduced to 8
        image.info["transparency"] = tuple(part >> 8 for part in key)
    colours = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(colours, mask=colours)
    return white
