"""Decoding: every kind of image that data sets hold, and every kind of damage, built here with Pillow."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlcp_dist.data import images
from vlcp_dist.data.images import BadImage, decode, decode_pixels, to_square

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_back_exactly(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = decode(encode(noise(), file_format, **options))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(noise()))


def test_jpeg_comes_back_closely():
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (30, 1, 3)))
    difference = np.asarray(decode(encode(ramp, "JPEG", quality=95))).astype(int) - np.asarray(ramp)
    assert abs(difference).max() <= 4


def test_cmyk_jpeg_is_not_inverted():
    # Pillow writes CMYK JPEGs the way Adobe does: inverted, with an Adobe marker.
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(np.asarray(decode(data)).astype(int) - RED).max() <= 3


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    grey = np.asarray(decode(encode(Image.fromarray(values))))
    assert grey.shape == (1, 5, 3)
    assert grey[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_big_endian_16_bit_grey_tiff():
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    header = b"MM\x00*" + struct.pack(">I", 8)
    tags = [(256, 3, 3), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 0), (278, 3, 1), (279, 4, 6)]
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value or offset))
        for tag, kind, value in tags
    )
    data = header + struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0) + values.astype(">u2").tobytes()
    assert np.asarray(decode(data))[0, :, 0].tolist() == [0, 1, 255]


def test_16_bit_grey_with_a_transparent_value():
    rows = b"\x00" + struct.pack(">HH", 1000, 65535 // 5)
    data = png((2, 1), 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 1000)))
    assert np.asarray(decode(data))[0].tolist() == [[255] * 3, [51] * 3]


def test_16_bit_rgb_png():
    rows = b"\x00" + struct.pack(">HHH", 0, 32768, 65535)
    assert np.asarray(decode(png((1, 1), 16, 2, rows)))[0, 0].tolist() == [0, 128, 255]


def test_palette_with_transparency_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    for transparency in (1, bytes([255, 0])):
        assert np.asarray(decode(encode(image, transparency=transparency)))[0].tolist() == [[*RED], [*WHITE]]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), WHITE),
        ("LA", (90, 255), (90, 90, 90)),
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
    ],
)
def test_modes(mode, colour, expected):
    image = decode(encode(Image.new(mode, (3, 2), colour)))
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert np.unique(np.asarray(image).reshape(-1, 3), axis=0).tolist() == [[*expected]]


def test_rgb_with_a_transparent_colour():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    assert np.asarray(decode(encode(image, transparency=RED)))[0].tolist() == [[*WHITE], [*GREEN]]


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert (np.asarray(decode(data)) == RED).all()


def test_one_pixel():
    assert np.asarray(decode(encode(Image.new("RGB", (1, 1), GREEN)))).tolist() == [[[*GREEN]]]


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn right"
    assert decode(encode(noise(40, 30), "JPEG", exif=exif)).size == (40, 30)


def test_odd_exif_neither_fails_nor_warns():
    assert decode(encode(noise(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")).size == (40, 30)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_truncated(file_format, part):
    data = encode(noise(), file_format)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * part)])


@pytest.mark.parametrize("data", [b"", b"\x00", b"not an image at all", b"<html>404</html>" * 100])
def test_not_an_image(data):
    with pytest.raises(BadImage, match="empty file" if not data else "not a readable image"):
        decode(data)


def test_formats_that_run_programs_are_refused():
    with pytest.raises(BadImage, match="not a readable image"):
        decode(encode(noise(), "EPS"))


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0)])
def test_zero_size(size):
    with pytest.raises(BadImage):
        decode(png(size, 8, 2, b""))


def test_bomb_is_refused_from_its_header():
    # 50000 x 50000: would be 7.5 GB of pixels, of which the file holds none.
    with pytest.raises(BadImage, match="pixel"):
        decode(png((50_000, 50_000), 8, 2, b""))


def test_the_limit_is_max_pixels():
    data = encode(noise(40, 30))
    assert decode(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(BadImage, match="40 x 30 pixels are more than the 1199 allowed"):
        decode(data, max_pixels=1199)


def test_large_images_below_the_limit_do_not_warn():
    # Beyond the size where Pillow warns (89 million pixels), within the limit.
    large = encode(Image.new("1", (9500, 9500)))
    assert decode(large).size == (9500, 9500)


@pytest.mark.parametrize("chunk", ["zTXt", "iCCP"])
def test_inflating_png_chunks(chunk):
    packed = zlib.compress(bytes(200 << 20), 9) if chunk == "zTXt" else zlib.compress(bytes(20 << 20), 9)
    name = b"Comment" if chunk == "zTXt" else b"icc"
    extra = png_chunk(chunk.encode(), name + b"\x00\x00" + packed)
    with pytest.raises(BadImage, match="too large"):
        decode(png((1, 1), 8, 2, b"\x00abc", extra))


def test_many_text_chunks():
    info = PngImagePlugin.PngInfo()
    for index in range(70):
        info.add_text(f"note{index}", "x" * 1_000_000, zip=True)
    with pytest.raises(BadImage, match=r"[Tt]oo much memory"):
        decode(encode(noise(), pnginfo=info))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(mode):
    with pytest.raises(BadImage, match=f"mode {mode}"):
        decode(encode(Image.new(mode, (4, 4)), "TIFF"))


def test_random_damage_gives_an_image_or_a_bad_image():
    rng = np.random.default_rng(1)
    for file_format in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        data = np.frombuffer(encode(noise(), file_format), np.uint8)
        for _ in range(150):
            damaged = data.copy()
            damaged[rng.integers(0, min(400, len(data)), 3)] = rng.integers(0, 256, 3)
            try:
                assert decode(damaged.tobytes(), max_pixels=100_000).mode == "RGB"
            except BadImage as error:
                assert str(error)


def test_a_bomb_leaves_nothing_on_stderr_and_pillow_as_it_was():
    code = """
import sys
from PIL import Image, ImageFile
from vlcp_dist.data.images import BadImage, decode
import warnings
before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
data = sys.stdin.buffer.read()
decode(data)
try:
    decode(data, max_pixels=1000)
except BadImage:
    pass
assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
"""
    data = encode(Image.new("1", (9500, 9500)))
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, env=os.environ, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_threads_decode_as_one_does():
    files = [encode(noise(20 + i, 30), file_format) for i in range(20) for file_format in ("JPEG", "PNG", "TIFF")]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode_pixels, files))
    for data, pixels in zip(files, together, strict=True):
        np.testing.assert_array_equal(pixels, decode_pixels(data))


def photograph(width: int = 130, height: int = 97, seed: int = 0) -> Image.Image:
    """Amplitudes fall with frequency as in photographs, and colours go mostly together."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width)
    planes = [
        np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width)) for _ in "lrgb"
    ]
    pixels = np.stack([planes[0] + plane / 2 for plane in planes[1:]], axis=-1)
    return Image.fromarray((118 + 60 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))


def difference(data: bytes) -> int:
    """Largest difference between our pixels of an image and Pillow's."""
    return int(np.abs(decode_pixels(data).astype(int) - np.asarray(decode(data))).max())


ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: to be turned by a quarter
JPEGS = {
    "4:2:0": (photograph(), {"subsampling": "4:2:0"}),
    "4:2:2": (photograph(), {"subsampling": "4:2:2"}),
    "4:4:4": (photograph(), {"subsampling": "4:4:4"}),
    "progressive": (photograph(), {"progressive": True}),
    "optimised": (photograph(), {"optimize": True, "quality": 30}),
    "restart markers": (photograph(), {"restart_marker_rows": 1}),
    "kept as RGB": (photograph(), {"keep_rgb": True}),
    "grey": (photograph().convert("L"), {}),
    "CMYK": (photograph().convert("CMYK"), {}),
    "turned by EXIF": (photograph(), {"exif": ROTATED}),
    "one pixel": (photograph().crop((0, 0, 1, 1)), {}),
    "one column": (photograph().crop((0, 0, 1, 97)), {"progressive": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("quality", [50, 90, 100])
def test_jpegs_are_the_pixels_of_pillow(kind, quality):
    """To within two levels in 255: another release of the same decoder may round otherwise."""
    image, options = JPEGS[kind]
    data = encode(image, "JPEG", **({"quality": quality} | options))
    assert decode_pixels(data).shape == (image.height, image.width, 3)
    assert difference(data) <= 2


def test_jpegs_of_photographs_do_not_go_through_pillow_and_others_do(monkeypatch):
    asked = []
    monkeypatch.setattr(images, "decode", lambda data, **_: asked.append(data) or photograph())
    usual = [encode(photograph(), "JPEG"), encode(photograph().convert("L"), "JPEG", progressive=True)]
    others = [encode(photograph().convert("CMYK"), "JPEG"), encode(photograph()), usual[0][:-40], b"", usual[0][:3]]
    for data in usual + others:
        assert decode_pixels(data).shape[2] == 3
    assert asked == others


def test_a_jpeg_that_is_too_large_or_damaged_is_what_pillow_says():
    whole = encode(photograph(), "JPEG")
    with pytest.raises(BadImage, match="130 x 97 pixels are more than the 1000 allowed"):
        decode_pixels(whole, max_pixels=1000)
    rng = np.random.default_rng(0)
    for i in range(200):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
        data = damaged.tobytes() if i % 2 else whole[: rng.integers(0, len(whole))]
        try:
            expected = decode(data, max_pixels=100_000)
        except BadImage as error:
            with pytest.raises(BadImage) as caught:
                decode_pixels(data, max_pixels=100_000)
            assert str(caught.value) == str(error)
        else:
            found = decode_pixels(data, max_pixels=100_000).astype(int)
            assert np.abs(found - np.asarray(expected)).max() <= 2


def test_squash_keeps_the_whole_image():
    wide = np.empty((50, 200, 3), np.uint8)
    wide[:, :100], wide[:, 100:] = RED, GREEN
    array = to_square(wide, 16, crop="squash")
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 16, 16), np.uint8, True)
    assert (array[:, :, 0] == np.array(RED)[:, None]).all()
    assert (array[:, :, -1] == np.array(GREEN)[:, None]).all()


@pytest.mark.parametrize(("width", "height"), [(90, 30), (30, 90)])
def test_center_takes_the_middle_alone(width, height):
    pixels = np.full((height, width, 3), RED, np.uint8)
    middle = (slice(None), slice(30, 60)) if width > height else (slice(30, 60), slice(None))
    pixels[middle] = GREEN
    assert (to_square(pixels, 10, crop="center") == np.array(GREEN)[:, None, None]).all()


def test_center_equals_resize_then_crop():
    """But for the rim, where what is cut off no longer shines in."""
    image = photograph(120, 80)
    expected = np.asarray(image.resize((60, 40), Image.Resampling.BILINEAR).crop((10, 0, 50, 40))).astype(int)
    array = to_square(np.array(image), 40, crop="center").transpose(1, 2, 0)
    assert np.abs(array - expected)[:, 1:-1].max() <= 1


@pytest.mark.parametrize("size", [8, 64, 97, 130, 336])
def test_resizing_is_pillows(size):
    """Smaller and larger, one way or both, smooth and noisy: to within one level in 255."""
    for image in (photograph(), photograph(97, 130), noise(), noise(1000, 20)):
        expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(to_square(np.array(image), size, crop="squash").astype(int) - expected).max() <= 1


def test_a_thin_line_is_no_bomb():
    line = np.full((1, 1_000_000, 3), RED, np.uint8)
    assert to_square(line, 512, crop="center").shape == (3, 512, 512)


def test_one_pixel_enlarges():
    assert (to_square(np.full((1, 1, 3), GREEN, np.uint8), 8, crop="center") == np.array(GREEN)[:, None, None]).all()


@pytest.mark.parametrize(
    ("pixels", "size", "crop", "message"),
    [
        (np.zeros((4, 4), np.uint8), 4, "squash", r"uint8 \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), 4, "squash", "float32"),
        (np.zeros((4, 4, 3), np.uint8), 0, "squash", "at least 1"),
        (np.zeros((4, 4, 3), np.uint8), 4, "corner", "corner"),
    ],
)
def test_to_square_names_bad_arguments(pixels, size, crop, message):
    with pytest.raises(ValueError, match=message):
        to_square(pixels, size, crop=crop)
