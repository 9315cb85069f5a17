"""Pictures are read as people see them: upright, in 8 bits, on white; what cannot be is unreadable, with a reason."""

import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from conftest import make_pack, run_script
from data.clips import Samples, read_image
from data.contents import open_path
from data.form import Form
from data.images import IMAGE_FORMATS, ON_WHITE, image_size, probe_image
from data.scan import scan
from data.untrusted import Unreadable, reading
from data.video import probe_video

# What a camera that is held in some way stores, by the orientation that it writes.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
KINDS = {"WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}, "JPEG": {"quality": 100, "subsampling": 0}}
if "AVIF" in IMAGE_FORMATS:
    KINDS["AVIF"] = {"quality": 100, "subsampling": "4:4:4"}


def picture() -> Image.Image:
    """40 by 24 pixels, other in each of its parts."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)).resize((40, 24), 0)


def pixels(path: Path, side: int = 16) -> np.ndarray:
    return read_image(str(path), side).permute(1, 2, 0).numpy().astype(int)  # (side, side, 3)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_turned_as_its_exif_says_before_it_is_cropped(tmp_path, kind, orientation):
    upright, exif = picture(), Image.Exif()
    exif[0x0112] = orientation
    turn = STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    stored.save(tmp_path / "stored", kind, exif=exif, **KINDS[kind])
    upright.save(tmp_path / "upright", kind, **KINDS[kind])
    difference = np.abs(pixels(tmp_path / "stored") - pixels(tmp_path / "upright"))
    assert difference.max() <= (4 if kind in ("JPEG", "AVIF") else 0)
    assert image_size(str(tmp_path / "stored")) == (40, 24)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_picture_whose_exif_is_damaged_is_upright(tmp_path, exif):
    picture().save(tmp_path / "damaged.jpg", exif=exif)
    picture().save(tmp_path / "plain.jpg")
    assert np.array_equal(pixels(tmp_path / "damaged.jpg"), pixels(tmp_path / "plain.jpg"))
    assert image_size(str(tmp_path / "damaged.jpg")) == (40, 24)


def png_of_16_bits(path: Path, values: np.ndarray, transparent: Sequence[int] = ()) -> None:
    """Writes (H, W, 3) uint16 as a PNG, in which one colour may be transparent. Pillow cannot."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    key = [(b"tRNS", struct.pack(">3H", *transparent))] if transparent else []
    for name, content in ((b"IHDR", header), *key, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data)


def tiff_of_12_bits(path: Path, values: np.ndarray) -> None:
    """Writes (H, W), 0 to 4095, as a grey TIFF of 12 bits, which Pillow cannot."""
    height, width = values.shape
    bits = "".join(f"{value:012b}" for value in values.reshape(-1))
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(start + data + struct.pack("<H", len(tags)) + entries + bytes(4))


RAMP = np.arange(256).reshape(16, 16)  # what 8 bits hold of each of the files below
DEEP: dict[str, Callable[[Path], None]] = {
    "grey PNG of 16 bits": lambda path: Image.fromarray((RAMP * 257).astype(np.uint16)).save(path, "PNG"),
    "grey TIFF of 16 bits": lambda path: Image.fromarray((RAMP * 257).astype(np.uint16)).save(path, "TIFF"),
    "the same, bytes reversed": lambda path: Image.fromarray((RAMP * 257).astype(">u2")).save(path, "TIFF"),
    "PGM of 16 bits": lambda path: path.write_bytes(b"P5 16 16 65535\n" + (RAMP * 257).astype(">u2").tobytes()),
    "PGM up to 1020": lambda path: path.write_bytes(b"P5 16 16 1020\n" + (RAMP * 4).astype(">u2").tobytes()),
    "TIFF of floats": lambda path: Image.fromarray((RAMP / 255).astype(np.float32)).save(path, "TIFF"),
    "grey TIFF of 12 bits": lambda path: tiff_of_12_bits(path, RAMP * 4095 // 255),
    "PNG of 16 bits in colour": lambda path: png_of_16_bits(path, np.stack([RAMP * 257] * 3, -1)),
    "PPM of 16 bits": lambda path: path.write_bytes(
        b"P6 16 16 65535\n" + np.stack([RAMP * 257] * 3, -1).astype(">u2").tobytes()
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_scaled_to_8_by_the_range_of_their_type(tmp_path, name):
    DEEP[name](tmp_path / "a")
    assert probe_image(str(tmp_path / "a")) == ()
    assert np.abs(pixels(tmp_path / "a") - RAMP[..., None]).max() <= (1 if "12" in name else 0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (RAMP.astype(np.int32), "32 bits"),
        (RAMP.astype(np.float32), r"from 0 to 255, outside \[0, 1\]"),
        (np.full((16, 16), np.nan, np.float32), "outside"),
        (np.full((16, 16), -0.1, np.float32), "outside"),
    ],
    ids=["integers", "floats to 255", "NaN", "negative"],
)
def test_values_of_unknown_range_are_unreadable_when_they_are_scanned(tmp_path, values, reason):
    Image.fromarray(values).save(tmp_path / "a.tif")
    for read in (probe_image, pixels):
        with pytest.raises(Unreadable, match=reason):
            read(str(tmp_path / "a.tif"))


def half_transparent(mode: str, path: Path, **options: object) -> None:
    """Writes red, or grey 90, left of the middle, and transparent pixels right of it that hide many colours."""
    alpha = np.repeat([255, 0], 8) * np.ones((16, 1))  # (16, 16)
    hidden = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    rgb = np.where(alpha[..., None] > 0, [255, 0, 0], hidden)
    rgba = Image.fromarray(np.concatenate([rgb, alpha[..., None]], -1).astype(np.uint8))
    if mode == "LA":
        grey = np.where(alpha > 0, 90, hidden[..., 0])
        rgba = Image.fromarray(np.stack([grey, alpha], -1).astype(np.uint8))
    rgba.save(path, **options)


def half_of_one_colour(mode: str, path: Path, **options: object) -> None:
    """The same, but the transparent pixels are those of one colour, as the file says: colour 7 of a palette, or 7."""
    values = np.repeat([90, 7], 8) * np.ones((16, 1))  # (16, 16)
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette([0, 0, 9] * 90 + [255, 0, 0] * 166)
    if mode == "RGB":
        image = image.convert("RGB")
    image.save(path, **options)


TRANSPARENT = {
    "PNG of RGBA": (half_transparent, "RGBA", "PNG", {}, (255, 0, 0)),
    "WebP": (half_transparent, "RGBA", "WEBP", {"lossless": True, "exact": True}, (255, 0, 0)),
    "TIFF": (half_transparent, "RGBA", "TIFF", {}, (255, 0, 0)),
    "grey and alpha": (half_transparent, "LA", "PNG", {}, (90, 90, 90)),
    "one colour of a palette": (half_of_one_colour, "P", "PNG", {"transparency": 7}, (255, 0, 0)),
    "alphas of a palette": (half_of_one_colour, "P", "PNG", {"transparency": bytes([255] * 7 + [0])}, (255, 0, 0)),
    "GIF": (half_of_one_colour, "P", "GIF", {"transparency": 7}, (255, 0, 0)),
    "one level of grey": (half_of_one_colour, "L", "PNG", {"transparency": 7}, (90, 90, 90)),
    "one colour": (half_of_one_colour, "RGB", "PNG", {"transparency": (7, 7, 7)}, (90, 90, 90)),
    "one level of 16 bits": (half_of_one_colour, "I;16", "PNG", {"transparency": 7}, (0, 0, 0)),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_parts_are_white_whatever_colours_they_hide(tmp_path, name):
    write, mode, kind, options, colour = TRANSPARENT[name]
    write(mode, tmp_path / "a", format=kind, **options)
    with warnings.catch_warnings(record=True) as said:
        assert probe_image(str(tmp_path / "a")) == (ON_WHITE,)
        found = pixels(tmp_path / "a")
    assert not said
    if name == "GIF":  # Pillow may sort the palette
        assert (found[:, :8] == found[0, 0]).all()
    else:
        assert (found[:, :8] == colour).all()
    assert (found[:, 8:] == 255).all()


def test_a_transparent_colour_of_16_bits_is_white(tmp_path):
    values = np.full((16, 16, 3), 0x2000)
    values[:, 8:] = key = (0x1234, 0x5678, 0x9ABC)
    png_of_16_bits(tmp_path / "a.png", values, key)
    assert (pixels(tmp_path / "a.png") == np.repeat([0x20, 255], 8)[:, None]).all()


def test_a_picture_with_an_alpha_channel_that_hides_nothing_is_the_one_without(tmp_path):
    picture().save(tmp_path / "a.png")
    picture().convert("RGBA").save(tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert probe_image(str(tmp_path / "a.png")) == ()


def test_what_pillow_says_about_files_does_not_reach_the_terminal(tmp_path):
    (tmp_path / "data" / "A").mkdir(parents=True)
    Image.new("1", (10_000, 9000)).save(tmp_path / "data" / "A" / "large.png")
    result = run_script("check_data.py", tmp_path / "data", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert "  A: 1" in result.stdout.splitlines()


def without_pixels(path: Path) -> Path:
    """A PNG without its IDAT chunk."""
    picture().save(path, "PNG")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"IDAT") - 4] + data[data.index(b"IEND") - 4 :])
    return path


def test_a_file_at_which_pillow_stumbles_is_unreadable_for_scan_pack_training_and_evaluation(tmp_path):
    folder = tmp_path / "set" / "A"
    folder.mkdir(parents=True)
    for i in range(20):
        picture().save(folder / f"{i}.png")
    good = scan(tmp_path / "set", video=False, show_progress=False)
    path = without_pixels(folder / "0.png")
    with pytest.raises(Unreadable):
        probe_image(str(path))
    found = scan(tmp_path / "set", video=False, show_progress=False)
    assert [name for name, _ in found.unreadable] == [str(path)]
    pack = make_pack(tmp_path / "set", tmp_path / "pack", video=False)
    assert [Path(name).name for name, _ in pack.found().unreadable] == ["0.png"]
    form = Form(False, 16)
    assert str(path) in str(Samples(good, form, seed=0)[0, 0]["unreadable"])
    with pytest.raises(Unreadable):
        open_path(tmp_path / "set", form, None, "evaluation").read(0)


ERRORS = [IndexError, AttributeError, struct.error, KeyError, TypeError, ZeroDivisionError, OverflowError]
ERRORS += [AssertionError, EOFError, RuntimeError, RecursionError, UnicodeDecodeError, av.error.MemoryError]


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_reader_raises_is_an_unreadable_file_with_a_reason_in_one_line(monkeypatch, tmp_path, error):
    arguments = {UnicodeDecodeError: ("ascii", b"x", 0, 1, "a\nb"), av.error.MemoryError: (12, "a\nb")}

    def stumble(*_: object, **__: object) -> None:
        raise error(*arguments.get(error, ("a\nb",)))

    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", stumble)
    monkeypatch.setattr(av, "open", stumble)
    for read in (probe_image, image_size, pixels, probe_video):
        with pytest.raises(Unreadable) as caught:
            read(str(tmp_path / "a.png"))
        assert str(caught.value).strip()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit])
def test_what_is_no_fault_of_a_file_passes_through(error):
    with pytest.raises(error), reading():
        raise error
