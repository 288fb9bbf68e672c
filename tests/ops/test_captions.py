"""What is told of a description without its image."""

import pytest

from vlcp_dist.ops.captions import names_class, repeats_phrase

LOOP = "with a long tail and a short ear "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog " + LOOP * 3, True),
        ("A dog " + LOOP * 2, False),
        ("A dog " + LOOP * 4 + "with a long", True),  # cut off by the token limit
        ("A dog. " + LOOP * 4 + "It stands on grass.", False),  # it got out of it
        ("It is very, very, very small.", False),
        ("very, very, very", False),
        ("red " * 8, True),
        ("A dog has ears, eyes and a nose, and its ears and its eyes are brown.", False),
        ("", False),
    ],
)
def test_a_phrase_said_again_and_again(text, expected):
    assert repeats_phrase(text) == expected


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("The Saluki stands.", "Saluki, gazelle hound", True),
        ("A gazelle hound runs", "Saluki, gazelle hound", True),
        ("A hound runs", "Saluki, gazelle hound", False),
        ("Two golf balls lie", "golf ball", True),
        ("Two churches", "church, church building", True),
        ("A golfball", "golf ball", False),
        ("The car", "carbon", False),
        ("A C++ book (1)", "++, book", True),
        ("text", "+++", False),
    ],
)
def test_a_description_names_its_class(text, name, expected):
    assert names_class(text, name) == expected
