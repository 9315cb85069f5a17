"""Image files through Pillow: checks a file, and reads its pixels."""

from PIL import Image, features

from data.untrusted import MAX_ASPECT, Unreadable, check_regular_file, is_long_and_thin, reading

# The formats of files with IMAGE_EXTENSIONS. Pillow would hand some others, such as EPS, to programs.
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
if "avif" in features.modules and features.check("avif"):  # not every Pillow has it
    IMAGE_FORMATS += ("AVIF",)


def open_image(path: str) -> Image.Image:
    """Opens an image of IMAGE_FORMATS, but does not read its pixels. The caller closes it, and is `reading`.

    Raises:
        Unreadable: it is not a file, or too long and thin.
        Exception: Pillow cannot open it.
    """
    check_regular_file(path)
    image = Image.open(path, formats=IMAGE_FORMATS)
    if is_long_and_thin(*image.size):
        image.close()
        raise Unreadable(f"its {image.width}x{image.height} pixels are over {MAX_ASPECT} times as long as wide")
    return image


@reading()
def image_size(path: str) -> tuple[int, int]:
    """Width and height in pixels, from the file's header.

    Raises:
        Unreadable: it has no header that Pillow can read.
    """
    with open_image(path) as image:
        return image.size


@reading()
def probe_image(path: str) -> tuple[str, ...]:
    """Checks an image's header and checksums without decoding it. Returns remarks about how it is read.

    Raises:
        Unreadable: it is not a whole image, or goes beyond a limit.
    """
    with open_image(path) as image:
        image.verify()
    return ()


@reading()
def decode_image(path: str) -> Image.Image:
    """An image's pixels, in mode RGB.

    Raises:
        Unreadable: they cannot be decoded.
    """
    with open_image(path) as image:
        return image.convert("RGB")
