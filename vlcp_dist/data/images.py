"""Encoded bytes -> RGB pixels -> a square of them; what cannot be decoded faithfully is a `BadImage`."""

import io
import threading
import warnings
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

# Formats are told by content, never by file name. Pillow's other readers stay shut: some start programs (EPS)
# or pick one of several images (ICO).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# `warnings.catch_warnings` swaps process-wide state, so only one thread at a time may be inside it.
_quiet = threading.Lock()


class BadImage(ValueError):
    """The bytes are no usable image. The message is the reason, fit for a list of failed samples."""


def decode(data: bytes, *, max_pixels: int = 178_956_970) -> Image.Image:
    """The first frame of an encoded image, as an 8-bit RGB Pillow image of the stored size.

    Transparent pixels are composited on white, 16-bit grey is scaled to 8 bit, EXIF orientation is not
    applied to JPEG, PNG and WebP (nor is it by the usual loaders of ImageNet). Raises `BadImage` for anything
    else than a complete BMP, GIF, JPEG, PNG, TIFF or WebP of at most `max_pixels` (width x height, known from
    the header before any pixel is decoded; above the default, Pillow itself refuses). Thread-safe.
    """
    if not data:
        raise BadImage("empty file")
    try:
        return _to_rgb(_load(data, max_pixels))
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not a readable image ({len(data)} bytes, begins with {data[:8]!r})") from None
    # Damaged bytes surface in Pillow as nearly any exception: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def decode_pixels(data: bytes, *, max_pixels: int = 178_956_970) -> np.ndarray:
    """As `decode`, as a uint8 array (height, width, 3), and JPEGs faster: the pixels are those of Pillow.

    Both decoders are libjpeg-turbo. Here it writes the array at once and leaves the interpreter to other threads.
    """
    pixels = _plain_jpeg(data, max_pixels)
    return np.array(decode(data, max_pixels=max_pixels)) if pixels is None else pixels


def to_square(pixels: np.ndarray, size: int, *, crop: Literal["squash", "center"]) -> np.ndarray:
    """Uint8 pixels (height, width, 3) as (3, size, size), resized bilinearly with antialiasing.

    "squash" resizes the whole image to the square, which changes its aspect. "center" does so with the largest
    centred square: "shorter side to `size`, then centre crop" without the long image in between. The result is
    Pillow's to within one level in 255, in a third of its time. Raises ValueError for another shape, size or crop.
    """
    import torch  # here, because those who list images but do not look at them need not wait for it

    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"expected uint8 pixels (height, width, 3), got {pixels.dtype} {pixels.shape}")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if crop == "center":
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    elif crop != "squash":
        raise ValueError(f'crop must be "squash" or "center", got {crop!r}')
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # a view: colour is the fastest axis, as torch likes it
    square = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return square[0].contiguous().numpy()


def _plain_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels of a whole, flawless JPEG in colour or grey; None for all else, of which Pillow has to judge."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > max_pixels:
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return pixels
    except ValueError:  # every warning of the library's is one
        return None


def _load(data: bytes, max_pixels: int) -> Image.Image:
    with _quiet, warnings.catch_warnings():
        # Pillow warns of what it copes with (odd EXIF) and of large images, where `max_pixels` has the say.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > max_pixels:
            raise BadImage(f"{image.width} x {image.height} pixels are more than the {max_pixels} allowed")
        if image.format == "TIFF":
            image.load()  # it parses, and warns about, more tags here
    image.load()  # outside the lock: this is where the time goes, and Pillow frees the interpreter for it
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        image = _grey16_to_grey8(image)
    if image.mode in ("I", "F"):
        raise BadImage(f"pixels of mode {image.mode} have no fixed range; store them as 8 or 16 bit")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _grey16_to_grey8(image: Image.Image) -> Image.Image:
    wide = np.asarray(image).astype(np.uint32)
    grey = ((wide * 255 + 32767) // 65535).astype(np.uint8)
    if "transparency" in image.info:  # one grey value that stands for "see-through": white, as in `_to_rgb`
        grey[wide == image.info["transparency"]] = 255
    return Image.fromarray(grey)
