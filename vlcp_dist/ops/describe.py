"""Describe a picture from measurements alone: the shape, light and colour of what stands out from its border.

Stands in for a vision-language model where no weights are at hand: one measured fact always becomes the same
word, so that the text prototypes (Algorithm 2) find words that tell the clusters of a class apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlcp_dist.ops.measure import Array, Figure, Scene, luminance, measure

# Share of the circle through its farthest point that a round object covers at least (a square: 0.64).
ROUND = 0.8
# Ratio of the principal axes below which an object has no direction of its own.
UNDIRECTED = 1.15

# measure: (thresholds, words), one word more than thresholds. Text prototypes count single words: a word
# belongs to one measure only, lest it mix two facts, and is no stop word (so no "top", "side", "thin").
# Offsets (*_x) run from left to right, heights downward.
BINS: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "position_x": ((-0.045, -0.015, 0.015, 0.045), ("left", "leftish", "centred", "rightish", "right")),
    "position_y": ((-0.06, -0.02, 0.02, 0.06), ("high", "raised", "level", "lowered", "low")),
    "lean": ((4.0, 12.0, 30.0, 65.0), ("upright", "leaning", "slanting", "tipping", "lying")),
    "aspect": (
        (0.5, 0.6, 0.68, 0.85, 1.2, 1.8),
        ("slender", "narrow", "tall", "stocky", "squarish", "wide", "long"),
    ),
    "loop_area": ((0.05, 0.14), ("pinhole", "small", "roomy")),
    "loop_height": ((0.42, 0.58), ("upper", "central", "lower")),
    "waist_x": ((-0.09, -0.03, 0.03, 0.09), ("concave", "bowed", "straight", "arched", "convex")),
    "waist_width": ((0.13, 0.19, 0.25), ("pinched", "trim", "stout", "broad")),
    "foot_x": ((-0.08, -0.03, 0.03, 0.08), ("tucked", "retreating", "planted", "stepping", "trailing")),
    "foot_width": ((0.13, 0.19, 0.24), ("tapered", "compact", "spreading", "flared")),
    "head_x": ((-0.08, -0.03, 0.03, 0.08), ("receding", "swept", "poised", "jutting", "hanging")),
    "head_width": ((0.13, 0.19, 0.24), ("pointed", "slim", "ample", "sweeping")),
    "halves": ((0.5, 0.62, 0.75, 0.88), ("unlike", "differing", "related", "similar", "matching")),
    "size": ((0.12, 0.25, 0.35, 0.5), ("tiny", "modest", "medium", "large", "huge")),
    "stroke": ((0.2, 0.29, 0.34, 0.42, 0.55), ("hairline", "fine", "sturdy", "bold", "heavy", "massive")),
    "brightness": (
        (0.22, 0.28, 0.33, 0.4, 0.48, 0.58),
        ("murky", "dark", "dim", "subdued", "bright", "radiant", "brilliant"),
    ),
    "object_light": ((-0.35, -0.12, 0.08, 0.3), ("silhouetted", "darker", "blending", "lighter", "glowing")),
    "ground_light": ((0.25, 0.4, 0.55, 0.7), ("shadowy", "dusky", "neutral", "pale", "glaring")),
    "lighting": ((-0.15, -0.05, 0.05, 0.15), ("overhead", "upward", "evenly", "downward", "underneath")),
    "contrast": ((0.15, 0.2, 0.25), ("muted", "gentle", "crisp", "stark")),
    "texture": ((0.1, 0.13, 0.16), ("plain", "smooth", "textured", "busy")),
}
# The object's colour, and the word for the same colour of the ground.
COLOURS = {
    "black": "blackish",
    "grey": "greyish",
    "white": "whitish",
    "red": "reddish",
    "orange": "orangey",
    "brown": "brownish",
    "yellow": "yellowish",
    "green": "greenish",
    "teal": "turquoise",
    "blue": "bluish",
    "purple": "purplish",
    "pink": "pinkish",
}


def describe_image(rgb: NDArray[np.uint8], class_name: str) -> str:
    """Describe an image of shape (h, w, 3), uint8 RGB, in two or three sentences of about 45 words.

    The sentences hold `class_name` and measured facts only, the most telling first, because training
    truncates at CLIP's 77 tokens. Deterministic. Raises ValueError if `rgb` is not of that shape and type.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ValueError(f"describe_image needs a uint8 array of shape (h, w, 3), got {rgb.dtype} {rgb.shape}")
    scene, figure = measure(rgb)
    if figure is None:
        return _empty_text(scene, class_name)
    return _outline_text(scene, figure, class_name) if scene.plain else _scene_text(scene, figure, class_name)


def colour_name(rgb: Array) -> str:
    """The nearest of the twelve names in COLOURS for one RGB colour in 0-255."""
    red, green, blue = (float(channel) for channel in rgb)
    high, low = max(red, green, blue), min(red, green, blue)
    chroma = high - low
    if high < 45 or chroma < 24 or chroma < 0.14 * high:
        light = (high + low) / 2
        return "black" if light < 60 else "white" if light > 185 else "grey"
    if high == red:
        hue = (green - blue) / chroma % 6 * 60
    elif high == green:
        hue = (blue - red) / chroma * 60 + 120
    else:
        hue = (red - green) / chroma * 60 + 240
    if 15 <= hue < 48:
        return "orange" if high > 190 and chroma > 0.55 * high else "brown"
    if hue >= 345 or hue < 15:
        return "pink" if high > 190 and chroma < 0.5 * high else "red"
    limits = ((68, "yellow"), (165, "green"), (195, "teal"), (258, "blue"), (300, "purple"), (345, "pink"))
    return next(name for limit, name in limits if hue < limit)


def word(measure_name: str, value: float) -> str:
    """The word of BINS that stands for a measure's value."""
    thresholds, words = BINS[measure_name]
    return words[int(np.searchsorted(thresholds, value, side="right"))]


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _posture(figure: Figure) -> list[str]:
    """Outline, direction and proportions, without what the object lacks: a disc does not lean."""
    if figure.roundness >= ROUND:
        return ["round"]
    proportions = word("aspect", figure.aspect)
    if figure.elongation < UNDIRECTED:
        return [proportions]
    lean = word("lean", abs(figure.lean))
    if lean not in ("upright", "lying"):
        lean += " leftward" if figure.lean < 0 else " rightward"
    return [lean, proportions]


def _place(figure: Figure) -> str:
    x, y = figure.position
    return f"placed {word('position_x', x)} and {word('position_y', y)}"


def _loop_phrase(figure: Figure) -> str:
    if figure.loops == 0:
        return "without loops"
    if figure.loops > 1:
        return "with twin loops" if figure.loops == 2 else "with several loops"
    return f"with one {word('loop_area', figure.loop_area)} {word('loop_height', figure.loop_height)} loop"


def _part(name: str, measured: tuple[float, float]) -> str:
    return _a(f"{word(f'{name}_x', measured[0])} {word(f'{name}_width', measured[1])} {name}")


def _outline_text(scene: Scene, figure: Figure, class_name: str) -> str:
    posture = ", ".join([*_posture(figure), _place(figure), _loop_phrase(figure)])
    waist, foot, head = (_part(name, getattr(figure, name)) for name in ("waist", "foot", "head"))
    look = f"{word('stroke', figure.stroke)}, {word('size', figure.size)} and {colour_name(figure.colour)}"
    ground = _a(f"{COLOURS[colour_name(scene.ground)]} ground")
    return (
        f"The {class_name} in the image is {posture}. "
        f"It has {waist}, {foot} and {head}, with {word('halves', figure.halves)} halves. "
        f"It is {look} on {ground}, the picture {word('brightness', scene.brightness)}."
    )


def _scene_text(scene: Scene, figure: Figure, class_name: str) -> str:
    look = f"{word('object_light', figure.light)} and {colour_name(figure.colour)}"
    posture = ", ".join([*_posture(figure), word("size", figure.size), _place(figure)])
    light = f"{word('brightness', scene.brightness)} and {word('contrast', scene.contrast)}"
    ground_light = word("ground_light", float(luminance(scene.ground)))
    ground = _a(f"{ground_light} {COLOURS[colour_name(scene.ground)]} ground")
    return (
        f"The {class_name} in the image is {look}, {posture}. "
        f"The picture is {light}, lit {word('lighting', scene.lighting)}, "
        f"with {_a(word('texture', scene.texture))} surface and {ground}."
    )


def _empty_text(scene: Scene, class_name: str) -> str:
    colour = f"{word('brightness', scene.brightness)} {COLOURS[colour_name(scene.ground)]}"
    return f"The {class_name} in the image shows no outline. The picture is {_a(colour)} surface."
