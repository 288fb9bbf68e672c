"""Text prototypes (Algorithm 2, Eq. 2-5): of each cluster's descriptions, the one with the most of its common words.

Also the prompts of the ablation in Table 5, which are made of the same keywords.
"""

import functools
import heapq
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from typing import Literal

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
    """`text` without double quotes and possessive 's (METHOD.md section 1), white space collapsed."""
    return " ".join(_CLUTTER.sub("", text).split())


def tokenize(text: str) -> list[str]:
    """The lower-cased words of `text` in order: runs of letters of any script, so "don't" gives "don", "t"."""
    return _WORD.findall(text.lower())


@functools.cache
def stop_words() -> frozenset[str]:
    """English function words, pinned in stopwords.txt beside this file."""
    lines = files("vlcp_dist.ops").joinpath("stopwords.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def nonrepresentative_words(descriptions: Iterable[str], beta: float) -> list[str]:
    """N (Eq. 2): the words, stop words apart, that at least a share `beta` of the descriptions hold; sorted.

    Raises ValueError for a beta outside (0, 1].
    """
    return _nonrepresentative([tokenize(text) for text in descriptions], beta)


def keywords(
    cluster_descriptions: Iterable[str], excluded: Collection[str], class_name: str, k: int
) -> list[tuple[str, int]]:
    """R_w (Eq. 3): the `k` words that occur most often in a cluster, with their total occurrences.

    Neither stop words, nor `excluded` (N), nor words found anywhere in the lower-cased class name. Ties go in
    alphabetical order. Raises ValueError for k < 1.
    """
    return _keywords([tokenize(text) for text in cluster_descriptions], excluded, class_name, k)


def text_prototype(
    keys: Sequence[str],
    descriptions: Sequence[str],
    keywords: Sequence[tuple[str, int]],
    *,
    matching: Matching = "word",
) -> ClusterText:
    """The description of one cluster with the highest score (Eq. 4-5); ties go to the smallest key.

    The score of a description sums R_w[w] over the keywords w in it, each once: as one of its words, or for
    `matching="substring"` anywhere in it, case-sensitively (METHOD.md section 6, step 5). If none scores, the result
    has no description and `fallback` is set.
    """
    tokens = [tokenize(text) for text in descriptions]
    return _text_prototype(keys, descriptions, tokens, keywords, matching)


def text_prototypes(
    keys: Sequence[str],
    descriptions: Sequence[str],
    labels: Iterable[int],
    class_name: str,
    *,
    n_clusters: int,
    beta: float = 0.7,
    k: int = 30,
    matching: Matching = "word",
) -> TextResult:
    """Algorithm 2 for one class: item i has key `keys[i]`, `descriptions[i]` and cluster `labels[i]`.

    The result does not depend on the order of the items. Raises ValueError when the three differ in length, for a
    label outside 0..n_clusters-1, and for beta, k or matching out of range.
    """
    labels = [int(label) for label in labels]
    if not len(keys) == len(descriptions) == len(labels):
        raise ValueError(
            f"one key, description and label per item: got {len(keys)}, {len(descriptions)} and {len(labels)}"
        )
    members: list[list[int]] = [[] for _ in range(n_clusters)]
    for item, label in enumerate(labels):
        if not 0 <= label < n_clusters:
            raise ValueError(f"item {keys[item]!r} has cluster {label}, outside 0..{n_clusters - 1}")
        members[label].append(item)

    tokens = [tokenize(text) for text in descriptions]
    excluded = _nonrepresentative(tokens, beta)
    clusters = []
    for items in members:
        own_tokens = [tokens[i] for i in items]
        common = _keywords(own_tokens, excluded, class_name, k)
        own_keys, own_descriptions = [keys[i] for i in items], [descriptions[i] for i in items]
        clusters.append(_text_prototype(own_keys, own_descriptions, own_tokens, common, matching))
    return TextResult(excluded, clusters)


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


def _nonrepresentative(tokens: Sequence[Sequence[str]], beta: float) -> list[str]:
    if not 0 < beta <= 1:
        raise ValueError(f"beta is a share of the descriptions in (0, 1], got {beta}")
    held_by = Counter(chain.from_iterable(set(words) for words in tokens))
    return sorted(w for w, count in held_by.items() if count / len(tokens) >= beta and w not in stop_words())


def _keywords(
    tokens: Iterable[Iterable[str]], excluded: Collection[str], class_name: str, k: int
) -> list[tuple[str, int]]:
    if k < 1:
        raise ValueError(f"k, the number of keywords, must be at least 1, got {k}")
    occurrences = Counter(chain.from_iterable(tokens))
    unwanted, name = stop_words().union(excluded), class_name.lower()
    kept = [(w, count) for w, count in occurrences.items() if w not in unwanted and w not in name]
    return heapq.nsmallest(k, kept, key=lambda pair: (-pair[1], pair[0]))


def _text_prototype(
    keys: Sequence[str],
    descriptions: Sequence[str],
    tokens: Sequence[Sequence[str]],
    keywords: Sequence[tuple[str, int]],
    matching: Matching,
) -> ClusterText:
    weights = dict(keywords)
    if matching == "word":
        scores = [_word_score(words, weights) for words in tokens]
    elif matching == "substring":
        scores = [sum(count for w, count in keywords if w in text) for text in descriptions]
    else:
        raise ValueError(f'unknown matching {matching!r}: choose "word" or "substring"')
    best = min(range(len(keys)), key=lambda i: (-scores[i], keys[i]), default=None)
    if best is None or scores[best] == 0:
        return ClusterText(None, None, 0, list(keywords), len(keys))
    return ClusterText(keys[best], descriptions[best], scores[best], list(keywords), len(keys))


def _word_score(words: Iterable[str], weights: Mapping[str, int]) -> int:
    return sum(weights[word] for word in weights.keys() & set(words))
