"""Measure what stands out from a picture's border: shape, light and colour as plain numbers.

Every threshold is absolute, so a picture measures the same whatever data set it stands in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

# Longer side, px, at which everything is measured: keeps the cost flat in the picture's size. A side shorter
# than SMALLEST_SIDE is repeated to at least that, so that halves and thirds are not empty.
WORKING_SIZE = 64
SMALLEST_SIDE = 9
# RGB distances (0-441) from the border's median colour: a picture nearer than FAINTEST_OBJECT everywhere holds
# noise only, and a border pixel within PLAIN_DISTANCE counts as of that colour.
FAINTEST_OBJECT = 16.0
PLAIN_DISTANCE = 48.0
# Share of such border pixels, and Otsu's separability, from which an outline can be trusted.
PLAIN_SHARE = 0.6
SEPARABLE = 0.74
# Parts below this share of the largest part's area are specks; holes below this share of the box are noise.
SMALLEST_PART = 0.1
SMALLEST_LOOP = 0.01
# Levels, of the object's full strength, at which holes are looked for: blur closes small ones at the lower.
LOOP_LEVELS = (0.4, 0.6)

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """What is measured over the whole frame. Light is luminance in [0, 1]."""

    brightness: float
    contrast: float
    texture: float
    lighting: float  # lower half minus upper half
    ground: Array  # the border's median RGB
    plain: bool  # the border is of one colour and an object stands clear of it


@dataclass(frozen=True)
class Figure:
    """What is measured of the object, as shares of its bounding box where nothing else is said.

    x grows to the right and y downward.
    """

    colour: Array  # RGB
    light: float  # the object's luminance minus the ground's
    size: float  # area, share of the frame
    position: tuple[float, float]  # of its mass, from the frame's centre, share of the frame
    aspect: float  # width / height
    lean: float  # degrees of the long axis from the vertical, positive: the upper end is further right
    elongation: float  # long principal axis / short one
    roundness: float  # area without holes / area of the circle through the farthest point
    loops: int
    loop_area: float  # of all loops
    loop_height: float  # of the largest loop: 0 at the upper edge of the box, 1 at the lower
    # Of the upper, middle and lower third: offset in x and spread (standard deviation). Head and foot are offset
    # from the frame's centre, a share of the frame; the waist from midway between the two.
    head: tuple[float, float]
    waist: tuple[float, float]
    foot: tuple[float, float]
    halves: float  # likeness of the object and its upside-down mirror image, 1: equal
    stroke: float  # mean thickness over the box's mean side


def measure(rgb: NDArray[np.uint8]) -> tuple[Scene, Figure | None]:
    """Measure an image of shape (h, w, 3), uint8 RGB; no figure where nothing differs from the border."""
    image = _working_copy(rgb)
    light = luminance(image)
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(image - ground, axis=2)
    near = float((np.linalg.norm(border - ground, axis=1) < PLAIN_DISTANCE).mean())
    threshold, separability = otsu(distance)
    half = light.shape[0] // 2
    scene = Scene(
        brightness=float(light.mean()),
        contrast=float(light.std()),
        texture=float(np.hypot(ndimage.sobel(light, 0), ndimage.sobel(light, 1)).mean()) / 4,
        lighting=float(light[half:].mean() - light[:half].mean()),
        ground=ground,
        plain=near >= PLAIN_SHARE and separability >= SEPARABLE,
    )
    if distance.max() < FAINTEST_OBJECT:
        return scene, None
    mask = _without_specks(distance > threshold)
    return scene, _measure_figure(image, light, distance, mask)


def _working_copy(rgb: NDArray[np.uint8]) -> Array:
    height, width = rgb.shape[:2]
    scale = WORKING_SIZE / max(height, width)
    if scale < 1:
        shape = max(1, round(width * scale)), max(1, round(height * scale))
        rgb = np.asarray(Image.fromarray(rgb).resize(shape, Image.Resampling.BOX))
    for axis in (0, 1):
        if rgb.shape[axis] < SMALLEST_SIDE:
            rgb = np.repeat(rgb, -(-SMALLEST_SIDE // rgb.shape[axis]), axis)
    return rgb.astype(np.float64)


def luminance(rgb: Array) -> Array:
    """Luminance (Rec. 601) in [0, 1] of RGB values in 0-255, shape (..., 3)."""
    return rgb @ np.array([0.299, 0.587, 0.114]) / 255


def otsu(values: Array) -> tuple[float, float]:
    """Otsu's threshold of non-negative values, and the share of the variance between the two classes."""
    top = max(float(values.max()), 1e-9)
    counts = np.histogram(values, bins=256, range=(0.0, top))[0] / values.size
    levels = np.arange(256.0)
    below, mean_below = counts.cumsum()[:-1], (counts * levels).cumsum()
    mean, variance = mean_below[-1], (counts * levels**2).sum() - mean_below[-1] ** 2
    between = (mean * below - mean_below[:-1]) ** 2 / np.maximum(below * (1 - below), 1e-12)
    best = int(between.argmax())
    return (best + 1) * top / 256, float(between[best] / max(variance, 1e-12))


def _without_specks(mask: Mask) -> Mask:
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    if count < 2:
        return mask
    areas = np.bincount(parts.ravel())
    areas[0] = 0
    kept: Mask = (areas >= SMALLEST_PART * areas.max())[parts]
    return kept


def _measure_figure(image: Array, light: Array, distance: Array, mask: Mask) -> Figure:
    box = ndimage.find_objects(mask.astype(np.int8))[0]
    height, width = (s.stop - s.start for s in box)
    # Soft edges count by how far they are from the ground, so that blurred and sharp pictures measure alike.
    weight = (np.minimum(distance / np.percentile(distance[mask], 90), 1.0) * mask)[box]
    ys, xs = _midpoints(height), _midpoints(width)
    cy, cx = _mean(weight.sum(1), ys), _mean(weight.sum(0), xs)
    dy, dx = ys[:, None] - cy, xs[None] - cx
    vyy, vxx, vxy = (float((weight * d).sum() / weight.sum()) for d in (dy * dy, dx * dx, dy * dx))
    root = float(np.hypot(vxx - vyy, 2 * vxy))
    filled = ndimage.binary_fill_holes(mask[box])
    loops, loop_area, loop_height = max(_loops(weight > level) for level in LOOP_LEVELS)
    left, frame_width = box[1].start, image.shape[1]
    (head_x, head_w), (waist_x, waist_w), (foot_x, foot_w) = (_third(weight, k) for k in range(3))
    return Figure(
        colour=np.median(image[box][weight >= np.median(weight[weight > 0])], axis=0),
        light=float(light[mask].mean() - light[~mask].mean()) if not mask.all() else 0.0,
        size=float(mask.mean()),
        position=((left + cx) / frame_width - 0.5, (box[0].start + cy) / image.shape[0] - 0.5),
        aspect=width / height,
        lean=float(np.degrees(0.5 * np.arctan2(-2 * vxy, vyy - vxx))),
        elongation=float(np.sqrt((vxx + vyy + root) / max(vxx + vyy - root, 1e-3))),
        roundness=float(filled.sum() / (np.pi * (np.hypot(dy, dx)[filled].max() + 0.5) ** 2)),
        loops=loops,
        loop_area=loop_area,
        loop_height=loop_height,
        head=((left + head_x) / frame_width - 0.5, head_w / width),
        waist=((waist_x - (head_x + foot_x) / 2) / width, waist_w / width),
        foot=((left + foot_x) / frame_width - 0.5, foot_w / width),
        halves=float((weight * weight[::-1]).sum() / (weight * weight).sum()),
        stroke=_thickness(mask[box]) / float(np.sqrt(height * width)),
    )


def _midpoints(size: int) -> Array:
    return np.arange(size, dtype=np.float64) + 0.5


def _mean(weights: Array, values: Array) -> float:
    return float((weights * values).sum() / weights.sum())


def _third(weight: Array, k: int) -> tuple[float, float]:
    """Mean and standard deviation of x, px, over third `k` from above; over the whole where it is empty."""
    height, width = weight.shape
    first = k * height // 3
    columns = weight[first : max((k + 1) * height // 3, first + 1)].sum(0)
    if not columns.any():
        columns = weight.sum(0)
    xs = _midpoints(width)
    centre = _mean(columns, xs)
    return centre, float(np.sqrt(_mean(columns, (xs - centre) ** 2)))


def _loops(mask: Mask) -> tuple[int, float, float]:
    """Number of enclosed holes, their area and the largest one's height, as shares of the mask."""
    parts, _ = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)
    areas = np.bincount(parts.ravel())
    areas[0] = 0
    areas[areas < SMALLEST_LOOP * mask.size] = 0
    if not areas.any():
        return 0, 0.0, 0.0
    rows = np.nonzero(parts == areas.argmax())[0]
    return int((areas > 0).sum()), float(areas.sum() / mask.size), float((rows.mean() + 0.5) / mask.shape[0])


def _thickness(mask: Mask) -> float:
    """Mean thickness, px: in a band of width b the distance to the edge averages b / 4."""
    return 4 * float(ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1][mask].mean())
