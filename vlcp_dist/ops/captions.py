"""What is wrong with a generated description, as far as that can be told without seeing the image."""

import re
from collections.abc import Sequence

from vlcp_dist.ops.text import tokenize

LONGEST_PHRASE = 24  # words
REPEATS = 3  # times in a row
SHORTEST_LOOP = 8  # words that all repeats together must have: "very, very, very" is English


def repeats_phrase(text: str) -> bool:
    """Whether `text` ends in a phrase said at least three times in a row, the last one perhaps cut off."""
    words = tokenize(text)
    return any(_ends_in_loop(words, length) for length in range(1, LONGEST_PHRASE + 1))


def names_class(text: str, class_name: str) -> bool:
    """Whether `text` has one of the comma-separated names of `class_name` as whole words, also in the plural."""
    words = f" {' '.join(tokenize(text))} "
    names = (" ".join(tokenize(name)) for name in class_name.split(","))
    return any(re.search(rf" {name}(s|es)? ", words) for name in names if name)


def _ends_in_loop(words: Sequence[str], length: int) -> bool:
    span = max(REPEATS * length, SHORTEST_LOOP)
    if len(words) < span:
        return False
    tail = words[-span:]
    return all(tail[i] == tail[i - length] for i in range(length, span))
