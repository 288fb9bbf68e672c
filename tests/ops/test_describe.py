"""Measured descriptions: true on drawn pictures, total on odd ones, telling on handwritten digits."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.naive_bayes import BernoulliNB

from vlcp_dist.ops.describe import BINS, COLOURS, colour_name, describe_image
from vlcp_dist.ops.measure import Figure, measure, otsu


def canvas(size=64, colour="black"):
    image = Image.new("RGB", (size, size), colour)
    return image, ImageDraw.Draw(image)


def bar(tilt, size=64, length=24, width=5):
    """A white bar on black, `tilt` degrees from the vertical, positive: its upper end to the right."""
    image, draw = canvas(size)
    dx, dy = length * np.sin(np.radians(tilt)), length * np.cos(np.radians(tilt))
    centre = size / 2
    draw.line([(centre - dx, centre + dy), (centre + dx, centre - dy)], fill="white", width=width)
    return image


def disc(colour="red", ground="white", radius=26, size=64, centre=None):
    image, draw = canvas(size, ground)
    x, y = centre or (size / 2, size / 2)
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return image


def ring(centre=(32, 32), radius=24):
    image, draw = canvas()
    x, y = centre
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline="white", width=7)
    return image


def words(image, name="thing"):
    return re.findall("[a-z]+", describe_image(np.asarray(image), name))


def figure(image) -> Figure:
    return measure(np.asarray(image))[1]


@pytest.fixture(scope="module")
def digits():
    """(uint8 (n, 32, 32, 3), labels, descriptions)"""
    data = load_digits()
    images = [
        np.asarray(
            Image.fromarray((image * 255 / 16).astype(np.uint8))
            .resize((32, 32), Image.Resampling.BICUBIC)
            .convert("RGB")
        )
        for image in data.images
    ]
    texts = [describe_image(image, "digit") for image in images]
    return np.stack(images), data.target, texts


def test_a_red_disc_is_red_round_and_large():
    said = words(disc())
    assert {"red", "round", "whitish", "huge", "centred", "level"} <= set(said)
    assert not {"leftward", "rightward", "upright", "lying"} & set(said)


@pytest.mark.parametrize(("radius", "size"), [(8, "tiny"), (16, "modest"), (20, "medium"), (24, "large"), (28, "huge")])
def test_size_is_named_by_area(radius, size):
    assert size in words(disc(radius=radius))


@pytest.mark.parametrize(
    ("tilt", "expected"),
    [
        (0, ["upright"]),
        (-8, ["leaning", "leftward"]),
        (8, ["leaning", "rightward"]),
        (-20, ["slanting", "leftward"]),
        (45, ["tipping", "rightward"]),
        (90, ["lying"]),
    ],
)
def test_a_bar_leans_as_it_was_drawn(tilt, expected):
    said = words(bar(tilt))
    assert set(expected) <= set(said)
    assert ("leftward" in said) == (tilt < 0)
    assert ("rightward" in said) == (0 < tilt < 90)
    assert figure(bar(tilt)).lean == pytest.approx(tilt, abs=2) or abs(tilt) == 90


def test_a_thin_bar_is_slender_and_a_lying_one_long():
    assert {"slender", "upright"} <= set(words(bar(0)))
    assert "long" in words(bar(90))


def test_a_ring_has_one_loop_and_a_bar_none():
    assert "with one roomy central loop" in describe_image(np.asarray(ring()), "thing")
    assert "without loops" in describe_image(np.asarray(bar(0)), "thing")


def test_loops_are_counted_and_placed():
    eight = Image.fromarray(np.maximum(ring((32, 19), 14), ring((32, 44), 14)))
    assert "twin" in words(eight)
    lollipop, draw = canvas()
    draw.ellipse([20, 4, 44, 28], outline="white", width=6)
    draw.line([(32, 26), (32, 60)], fill="white", width=6)
    assert {"one", "upper", "loop"} <= set(words(lollipop))
    assert {"one", "lower", "loop"} <= set(words(lollipop.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))


def test_position_and_mirroring():
    left_high = words(disc(radius=12, centre=(18, 20)))
    right_low = words(disc(radius=12, centre=(46, 44)))
    assert {"left", "high"} <= set(left_high)
    assert {"right", "low"} <= set(right_low)


def test_head_waist_and_foot():
    triangle, draw = canvas()
    draw.polygon([(32, 6), (8, 58), (56, 58)], fill="white")
    head, waist, foot = (getattr(figure(triangle), part)[1] for part in ("head", "waist", "foot"))
    assert head < waist < foot
    assert {"pointed", "flared"} <= set(words(triangle))


def test_thickness_of_a_band_is_its_width():
    image, draw = canvas()
    draw.rectangle([20, 4, 31, 59], fill="white")
    assert figure(image).stroke * np.sqrt(12 * 56) == pytest.approx(12, rel=0.15)


def test_halves_compare_the_object_with_its_upside_down_self():
    assert figure(disc()).halves == pytest.approx(1, abs=0.02)
    lollipop, draw = canvas()
    draw.ellipse([14, 2, 50, 38], fill="white")
    draw.line([(32, 38), (32, 61)], fill="white", width=4)
    assert figure(lollipop).halves < 0.7


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"),
        ((128, 128, 128), "grey"),
        ((250, 250, 245), "white"),
        ((220, 20, 20), "red"),
        ((250, 140, 0), "orange"),
        ((120, 70, 30), "brown"),
        ((240, 230, 20), "yellow"),
        ((30, 160, 40), "green"),
        ((0, 160, 160), "teal"),
        ((30, 60, 220), "blue"),
        ((130, 40, 180), "purple"),
        ((250, 150, 200), "pink"),
    ],
)
def test_colour_names(rgb, name):
    assert colour_name(np.array(rgb, float)) == name


def test_colours_of_object_and_ground_do_not_share_words():
    assert {"blue", "yellowish"} <= set(words(disc("blue", "yellow")))
    assert {"yellow", "bluish"} <= set(words(disc("yellow", "blue")))


def scenery(upper, lower, side=48):
    """Noise over a bright and a dark half: a picture without a plain border."""
    pixels = np.random.default_rng(0).integers(-25, 26, (side, side, 3)).astype(int)
    pixels[: side // 2] += upper
    pixels[side // 2 :] += lower
    return pixels.clip(0, 255).astype(np.uint8)


def test_a_scene_is_told_by_its_light():
    assert "overhead" in words(scenery(210, 60))
    assert "underneath" in words(scenery(60, 210))
    assert "brilliant" in words(scenery(230, 150))
    assert "murky" in words(scenery(30, 70))


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3), (9, 9), (32, 32), (300, 700)])
@pytest.mark.parametrize("fill", ["constant", "noise", "one pixel", "two tones"])
def test_every_picture_has_a_description(shape, fill):
    pixels = np.full((*shape, 3), 90, np.uint8)
    if fill == "noise":
        pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    elif fill == "one pixel":
        pixels[shape[0] // 2, shape[1] // 2] = 255
    elif fill == "two tones":
        pixels[shape[0] // 2 :] = 200
    text = describe_image(pixels, "Saluki, gazelle hound")
    assert text.startswith("The Saluki, gazelle hound in the image ")
    assert text.endswith(".")
    assert "nan" not in text
    assert len(text.split()) < 60


def test_a_constant_picture_shows_no_outline():
    text = describe_image(np.full((32, 32, 3), (200, 30, 30), np.uint8), "wall")
    assert text == "The wall in the image shows no outline. The picture is a dim reddish surface."


def test_the_size_in_pixels_does_not_matter():
    small = disc(size=64, radius=20)
    large = small.resize((512, 512), Image.Resampling.NEAREST)
    assert describe_image(np.asarray(small), "x") == describe_image(np.asarray(large), "x")


@pytest.mark.parametrize(
    "bad",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_arrays_are_refused(bad):
    with pytest.raises(ValueError, match=r"uint8 array of shape \(h, w, 3\)"):
        describe_image(bad, "x")


def test_otsu_splits_two_levels():
    values = np.array([1.0] * 30 + [9.0] * 10)
    threshold, separability = otsu(values)
    assert 1 < threshold < 9
    assert separability == pytest.approx(1)


def test_every_word_belongs_to_one_measure_and_is_no_stop_word():
    vocabulary = [word for _, words in BINS.values() for word in words]
    vocabulary += [*COLOURS, *COLOURS.values(), "leftward", "rightward", "round"]
    assert len(vocabulary) == len(set(vocabulary))
    assert not set(vocabulary) & ENGLISH_STOP_WORDS
    for thresholds, names in BINS.values():
        assert len(names) == len(thresholds) + 1
        assert list(thresholds) == sorted(thresholds)


def test_same_picture_same_words(digits):
    images, _, texts = digits
    assert [describe_image(image.copy(), "digit") for image in images[:50]] == texts[:50]


def test_digits_are_told_apart(digits):
    _, labels, texts = digits
    assert len(set(texts)) > 0.95 * len(texts)
    assert max(len(text.split()) for text in texts) < 60
    loops = [re.search("without|one|twin|several", text)[0] for text in texts]
    closed = np.array([name != "without" for name in loops])
    assert closed[labels == 0].mean() > 0.85
    assert closed[labels == 1].mean() < 0.05


def test_words_tell_the_clusters_of_a_class(digits):
    """What text prototypes live on: within each class the words betray which K-means cluster an image is in."""
    images, labels, texts = digits
    accuracy = []
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        clusters = KMeans(5, n_init=3, random_state=0).fit_predict(images[rows, ..., 0].reshape(len(rows), -1))
        said = [set(re.findall("[a-z]+", texts[row])) - ENGLISH_STOP_WORDS for row in rows]
        bags = np.array([[word in bag for word in sorted(set().union(*said))] for bag in said])
        bags = bags[:, bags.mean(0) < 0.7]
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        accuracy.append((cross_val_predict(BernoulliNB(), bags, clusters, cv=folds) == clusters).mean())
    # Chance is 0.2, the largest cluster 0.27.
    assert np.mean(accuracy) > 0.65
    assert min(accuracy) > 0.45
