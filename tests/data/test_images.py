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

from vlcp_dist.data.images import BadImage, decode, to_array

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
    images = [encode(noise(20 + i, 30), file_format) for i in range(20) for file_format in ("JPEG", "PNG", "TIFF")]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decode, images))
    for data, image in zip(images, together, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(decode(data)))


def test_squash_keeps_the_whole_image():
    wide = Image.new("RGB", (200, 50), RED)
    wide.paste(GREEN, (100, 0, 200, 50))
    array = to_array(wide, 16, crop="squash")
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 16, 16), np.uint8, True)
    assert (array[:, :, 0] == np.array(RED)[:, None]).all()
    assert (array[:, :, -1] == np.array(GREEN)[:, None]).all()


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_center_takes_the_middle(size):
    image = Image.new("RGB", size, RED)
    middle = (30, 0, 60, 30) if size[0] > size[1] else (0, 30, 30, 60)
    image.paste(GREEN, middle)
    array = to_array(image, 10, crop="center")
    assert (array[:, 1:-1, 1:-1] == np.array(GREEN)[:, None, None]).all()


def test_center_equals_resize_then_crop():
    image = noise(120, 80)
    expected = np.asarray(image.resize((60, 40), Image.Resampling.BILINEAR).crop((10, 0, 50, 40)))
    array = to_array(image, 40, crop="center").transpose(1, 2, 0)
    np.testing.assert_array_equal(array, expected)


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    array = to_array(Image.fromarray(stripes), 8, crop="squash")
    assert abs(array.astype(int) - 128).max() < 20


def test_a_thin_line_is_no_bomb():
    line = Image.new("RGB", (1_000_000, 1), RED)
    assert to_array(line, 512, crop="center").shape == (3, 512, 512)


def test_one_pixel_enlarges():
    assert (to_array(Image.new("RGB", (1, 1), GREEN), 8, crop="center") == np.array(GREEN)[:, None, None]).all()


@pytest.mark.parametrize(
    ("image", "size", "crop", "message"),
    [
        (Image.new("L", (4, 4)), 4, "squash", "mode L"),
        (Image.new("RGB", (4, 4)), 0, "squash", "at least 1"),
        (Image.new("RGB", (4, 4)), 4, "corner", "corner"),
    ],
)
def test_to_array_names_bad_arguments(image, size, crop, message):
    with pytest.raises(ValueError, match=message):
        to_array(image, size, crop=crop)
