"""Text prototypes (Algorithm 2, Eq. 2-5): of each cluster's descriptions, the one with the most of its common words.

Also the prompts of the ablation in Table 5, which are made of the same keywords.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import numpy as np

Matching = Literal["word", "substring"]
PromptStrategy = Literal["L", "L+FK", "GGS", "DCS"]

_WORD = re.compile(r"[^\W\d_]+")  # runs of Unicode letters
_CLUTTER = re.compile(r"[\"“”„]|['’]s\b")
_SENTENCE_KEYWORDS = 10


@dataclass(frozen=True)
class ClusterText:
    """What one cluster's descriptions come to."""

    key: str | None  # of the image whose description was chosen; None: nothing scored
    description: str | None
    score: int
    keywords: list[tuple[str, int]]  # R_w: the most common words with their occurrences
    size: int  # descriptions in the cluster

    @property
    def fallback(self) -> bool:
        """Whether no description scored, so that only the class name is left to prompt with."""
        return self.description is None


@dataclass(frozen=True)
class TextResult:
    """A class's non-representative words N, sorted, and its clusters by number."""

    nonrepresentative: list[str]
    clusters: list[ClusterText]


def clean_description(text: str) -> str:
    """`text` without double quotes and possessive 's (docs/method.md, 1), white space collapsed."""
    return " ".join(_CLUTTER.sub("", text).split())


def tokenize(text: str) -> list[str]:
    """The lower-cased words of `text` in order: runs of letters of any script, so "don't" gives "don", "t"."""
    return _WORD.findall(text.lower())


@functools.cache
def stop_words() -> frozenset[str]:
    """English function words, pinned in stopwords.txt beside this file."""
    lines = files("vlcp_dist.ops").joinpath("stopwords.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


@dataclass(frozen=True)
class Words:
    """A class's descriptions taken apart once, for every IPC: entry e says that text `text[e]` holds `word[e]`."""

    keys: Sequence[str]
    descriptions: Sequence[str]
    vocabulary: list[str]  # sorted, so that the order of word numbers is the alphabet's
    text: np.ndarray  # int64, ascending
    word: np.ndarray  # int64, index into vocabulary; each pair (text, word) once
    count: np.ndarray  # int64: how often


def count_words(keys: Sequence[str], descriptions: Sequence[str]) -> Words:
    """The words of each description. Raises ValueError when there is not one key for each."""
    if len(keys) != len(descriptions):
        raise ValueError(f"one key and description per item: got {len(keys)} and {len(descriptions)}")
    tokens = [tokenize(text) for text in descriptions]
    vocabulary = sorted({word for words in tokens for word in words})
    number = {word: i for i, word in enumerate(vocabulary)}
    text = np.repeat(np.arange(len(tokens)), [len(words) for words in tokens])
    word = np.fromiter((number[word] for words in tokens for word in words), np.int64, len(text))
    pairs, count = np.unique(text * len(vocabulary) + word, return_counts=True)
    text, word = np.divmod(pairs, max(1, len(vocabulary)))
    return Words(keys, descriptions, vocabulary, text, word, count)


def text_prototypes(
    words: Words,
    labels: Sequence[int] | np.ndarray,
    class_name: str,
    *,
    n_clusters: int,
    beta: float = 0.7,
    k: int = 30,
    matching: Matching = "word",
) -> TextResult:
    """Algorithm 2 for one class whose item i is in cluster `labels[i]`. The order of the items does not matter.

    N (Eq. 2): words, stop words apart, that at least a share `beta` of the descriptions hold. R_w (Eq. 3): of each
    cluster the `k` words that occur most often, with their total occurrences; neither stop words, nor N, nor words
    found anywhere in the lower-cased class name; ties in alphabetical order. Score (Eq. 4-5): the sum of R_w[w] over
    the keywords w in a description, each once, as one of its words or, for `matching="substring"`, anywhere in it,
    case-sensitively (docs/method.md, 6). The highest wins, ties go to the smallest key; where none scores,
    the cluster has no description and `fallback` is set.

    Raises ValueError when there is not one label per item, for a label outside 0..n_clusters-1, and for beta, k or
    matching out of range.
    """
    labels = np.asarray(labels, dtype=np.int64)
    _check(words, labels, n_clusters, beta=beta, k=k, matching=matching)
    is_common, is_wanted = _classify(words, class_name, beta)
    occurrences = np.bincount(
        labels[words.text] * len(words.vocabulary) + words.word,
        weights=words.count,
        minlength=n_clusters * len(words.vocabulary),
    ).reshape(n_clusters, len(words.vocabulary))
    occurrences[:, ~is_wanted] = 0
    top = [_most(row, k) for row in occurrences]
    keywords = [[(words.vocabulary[w], int(occurrences[c, w])) for w in ids] for c, ids in enumerate(top)]
    if matching == "word":
        weights = np.zeros_like(occurrences)
        for c, ids in enumerate(top):
            weights[c, ids] = occurrences[c, ids]
        scores = np.bincount(words.text, weights=weights[labels[words.text], words.word], minlength=len(labels))
    else:
        scores = np.array(
            [
                sum(count for w, count in keywords[label] if w in text)
                for text, label in zip(words.descriptions, labels, strict=True)
            ]
        )
    by_key = np.empty(len(labels), dtype=np.int64)
    by_key[sorted(range(len(labels)), key=words.keys.__getitem__)] = np.arange(len(labels))
    best_first = np.lexsort((by_key, -scores, labels))
    starts = np.searchsorted(labels[best_first], np.arange(n_clusters))
    sizes = np.bincount(labels, minlength=n_clusters)
    clusters = [
        _cluster(words, best_first[starts[c]] if sizes[c] else None, scores, keywords[c], int(sizes[c]))
        for c in range(n_clusters)
    ]
    return TextResult([words.vocabulary[w] for w in np.flatnonzero(is_common)], clusters)


def prompt_for(
    strategy: PromptStrategy,
    *,
    class_name: str,
    description: str | None,
    keywords: Sequence[str],
) -> str:
    """The prompt of one prototype under a strategy of Table 5.

    "L": the class name; "L+FK": the class name and the keywords, comma-joined; "GGS": a sentence of the class name
    and the keywords (`template_sentence`; a language model writes another); "DCS", the method's: the description, or
    the class name where a cluster has none.

    Raises ValueError for another strategy.
    """
    if strategy == "L":
        return class_name
    if strategy == "L+FK":
        return ", ".join([class_name, *keywords])
    if strategy == "GGS":
        return template_sentence(class_name, keywords)
    if strategy == "DCS":
        return class_name if description is None else description
    raise ValueError(f'unknown prompt strategy {strategy!r}: choose "L", "L+FK", "GGS" or "DCS"')


def template_sentence(class_name: str, keywords: Sequence[str]) -> str:
    """One plain sentence with the first ten keywords: "GGS" without a language model."""
    words = list(keywords[:_SENTENCE_KEYWORDS])
    if not words:
        return f"The image shows the {class_name}."
    features = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"The image shows the {class_name}, which stands out by these features: {features}."


def _check(words: Words, labels: np.ndarray, n_clusters: int, *, beta: float, k: int, matching: str) -> None:
    if len(labels) != len(words.keys):
        raise ValueError(f"one label per description: got {len(labels)} and {len(words.keys)}")
    outside = np.flatnonzero((labels < 0) | (labels >= n_clusters))
    if len(outside):
        item = outside[0]
        raise ValueError(f"item {words.keys[item]!r} has cluster {labels[item]}, outside 0..{n_clusters - 1}")
    if not 0 < beta <= 1:
        raise ValueError(f"beta is a share of the descriptions in (0, 1], got {beta}")
    if k < 1:
        raise ValueError(f"k, the number of keywords, must be at least 1, got {k}")
    if matching not in ("word", "substring"):
        raise ValueError(f'unknown matching {matching!r}: choose "word" or "substring"')


def _classify(words: Words, class_name: str, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the vocabulary, which words are non-representative (N), and which may be keywords: two masks."""
    stop, name = stop_words(), class_name.lower()
    is_stop = np.array([word in stop for word in words.vocabulary], dtype=bool)
    is_name = np.array([word in name for word in words.vocabulary], dtype=bool)
    held_by = np.bincount(words.word, minlength=len(words.vocabulary))
    is_common = (held_by / max(1, len(words.keys)) >= beta) & ~is_stop
    return is_common, ~(is_stop | is_common | is_name)


def _most(occurrences: np.ndarray, k: int) -> np.ndarray:
    """The words (at most k) with the most occurrences above 0, in falling order, ties by number."""
    held = np.flatnonzero(occurrences)
    if len(held) > k:  # sort only those that can be among the first k
        least = np.partition(occurrences[held], -k)[-k]
        held = held[occurrences[held] >= least]
    return held[np.argsort(-occurrences[held], kind="stable")][:k]


def _cluster(
    words: Words, best: int | None, scores: np.ndarray, keywords: list[tuple[str, int]], size: int
) -> ClusterText:
    if best is None or scores[best] == 0:
        return ClusterText(None, None, 0, keywords, size)
    return ClusterText(words.keys[best], words.descriptions[best], int(scores[best]), keywords, size)
