"""Pictures inside a page: small tiles and contact sheets as data URIs."""

import base64
import io
from collections.abc import Sequence

from PIL import Image

TILE = 96  # pixels; larger images are shrunk to it
TINY = 64  # pixels; images up to this size keep their pixels, and a browser enlarges them without blur
GAP = 2
BLANK = (226, 229, 233)


def tile(image: Image.Image) -> Image.Image:
    """The image in RGB, at most TILE pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return small


def blank(size: int) -> Image.Image:
    """What stands for an image that is not there."""
    return Image.new("RGB", (size, size), BLANK)


def contact_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Tiles of one size on white, GAP pixels apart. Raises ValueError for no tiles."""
    sizes = {image.size for row in rows for image in row}
    if len(sizes) != 1:
        raise ValueError(f"a contact sheet needs tiles of one size, got {sorted(sizes)}")
    width, height = sizes.pop()
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            sheet.paste(image, (c * (width + GAP), r * (height + GAP)))
    return sheet


def data_uri(image: Image.Image, tile_size: int) -> str:
    """PNG where the tiles are tiny, JPEG where photographs would make a page too large."""
    buffer = io.BytesIO()
    if tile_size <= TINY:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, "JPEG", quality=86, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
