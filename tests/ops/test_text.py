"""Text prototypes against an independent, plain reading of Algorithm 2, and the prompts made of them."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcp_dist.ops.text import (
    ClusterText,
    TextResult,
    clean_description,
    count_words,
    prompt_for,
    stop_words,
    template_sentence,
    text_prototypes,
    tokenize,
)

VOCABULARY = ["fur", "brown", "Long", "EARS", "dog", "hound", "the", "of", "Élan", "tail", "stand", "standing"]
CLASS_NAME = "Saluki, gazelle hound"


def plain_algorithm_2(items, class_name, *, n_clusters, beta, k, substring):
    """items: (key, description, cluster). Returns N and, per cluster, (key, score, R_w as a dict)."""

    def words_of(text):
        found, word = [], ""
        for character in text.lower() + " ":
            if character.isalpha():
                word += character
            elif word:
                found.append(word)
                word = ""
        return found

    every_word = {w for _, text, _ in items for w in words_of(text)}
    excluded = set()
    for w in every_word:
        document_frequency = sum(w in words_of(text) for _, text, _ in items)
        if document_frequency / len(items) >= beta and w not in stop_words():
            excluded.add(w)

    clusters = []
    for c in range(n_clusters):
        mine = [(key, text) for key, text, cluster in items if cluster == c]
        everything = [w for _, text in mine for w in words_of(text)]
        frequency = {
            w: everything.count(w)
            for w in set(everything)
            if w not in stop_words() and w not in excluded and class_name.lower().find(w) < 0
        }
        top = sorted(sorted(frequency), key=lambda w: frequency[w], reverse=True)[:k]
        best_key, best_score = None, 0
        for key, text in sorted(mine):
            within = text if substring else words_of(text)
            score = sum(frequency[w] for w in top if w in within)
            if score > best_score:
                best_key, best_score = key, score
        clusters.append((best_key, best_score, {w: frequency[w] for w in top}))
    return excluded, clusters


descriptions_strategy = st.lists(st.sampled_from(VOCABULARY), max_size=8).map(", ".join)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.tuples(descriptions_strategy, st.integers(0, 2)), max_size=12),
    beta=st.sampled_from([0.2, 0.3, 0.5, 0.7, 1.0]),
    k=st.integers(1, 6),
    substring=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_is_algorithm_2(
    texts: list[tuple[str, int]], beta: float, k: int, substring: bool, order: random.Random
) -> None:
    items = [(f"{i:03d}", text, cluster) for i, (text, cluster) in enumerate(texts)]
    order.shuffle(items)
    excluded, clusters = plain_algorithm_2(items, CLASS_NAME, n_clusters=3, beta=beta, k=k, substring=substring)

    result = text_prototypes(
        count_words([key for key, _, _ in items], [text for _, text, _ in items]),
        [cluster for _, _, cluster in items],
        CLASS_NAME,
        n_clusters=3,
        beta=beta,
        k=k,
        matching="substring" if substring else "word",
    )

    assert result.nonrepresentative == sorted(excluded)
    assert [(c.key, c.score, dict(c.keywords)) for c in result.clusters] == clusters
    text_of = {key: text for key, text, _ in items}
    for number, cluster in enumerate(result.clusters):
        assert cluster.description == (None if cluster.key is None else text_of[cluster.key])
        assert cluster.fallback == (cluster.key is None)
        assert cluster.size == sum(label == number for _, _, label in items)


def test_tokens_are_lower_cased_words_of_any_script() -> None:
    assert tokenize("A well-kept dog's coat: 2 colours, don't_know; Élan ÜBER 犬 x2y") == (
        ["a", "well", "kept", "dog", "s", "coat", "colours", "don", "t", "know", "élan", "über", "犬", "x", "y"]
    )
    assert tokenize("") == tokenize("12 -- 34_5 !") == []


def test_clean_description() -> None:
    text = " The  \"Saluki's\" coat,\n the dog’s “long” ears\t(owners' dogs) "
    assert clean_description(text) == "The Saluki coat, the dog long ears (owners' dogs)"
    assert clean_description("the 'small' dog") == "the 'small' dog"
    assert clean_description("") == ""


def test_stop_words_hold_function_words_and_nothing_that_looks() -> None:
    words = stop_words()
    assert {"is", "the", "of", "and", "its", "with", "t", "s", "don", "also"} <= words
    assert not {"black", "long", "small", "dog", "standing", "ears", "round", "left"} & words
    assert all(tokenize(word) == [word] for word in words)
    assert 150 <= len(words) <= 250


def prototypes_of(descriptions, labels=None, class_name="x", **settings) -> TextResult:
    """Keys a, b, c ...; one cluster if no labels are given; only what all share is non-representative."""
    words = count_words([chr(ord("a") + i) for i in range(len(descriptions))], descriptions)
    labels = labels or [0] * len(descriptions)
    return text_prototypes(
        words, labels, class_name, **{"n_clusters": max(labels, default=0) + 1, "beta": 1.0, "k": 100, **settings}
    )


def test_nonrepresentative_words_are_those_of_at_least_beta() -> None:
    descriptions = ["the dog is brown brown brown", "the dog is white", "the Dog is brown", "a cat"]

    def common(beta: float) -> list[str]:
        return prototypes_of(descriptions, beta=beta).nonrepresentative

    assert common(0.75) == ["dog"]  # held by exactly 3 of 4
    assert common(0.5) == ["brown", "dog"]
    assert common(0.76) == []
    assert prototypes_of([]).nonrepresentative == []
    for tenths in range(1, 11):  # shares are compared exactly
        texts = ["fur"] * tenths + ["tail"] * (10 - tenths)
        assert "fur" in prototypes_of(texts, beta=tenths / 10).nonrepresentative
    for beta in (0, -1, 1.1):
        with pytest.raises(ValueError, match="beta"):
            common(beta)


def test_keywords_count_every_occurrence_and_break_ties_by_alphabet() -> None:
    texts = ["Fur fur fur, and a tail", "ears, tail; the zebra hound's eyes", "gaze", "ears", "ears", "ears"]
    labels = [0, 0, 0, 1, 1, 1]

    def keywords(**settings) -> list[tuple[str, int]]:
        return prototypes_of(texts, labels, CLASS_NAME, beta=0.5, **settings).clusters[0].keywords

    assert keywords() == [("fur", 3), ("tail", 2), ("eyes", 1), ("zebra", 1)]  # gaze and hound are in the name
    assert keywords(k=2) == [("fur", 3), ("tail", 2)]
    assert keywords(k=3) == [("fur", 3), ("tail", 2), ("eyes", 1)]
    with pytest.raises(ValueError, match="at least 1"):
        keywords(k=0)


def test_matching_by_word_or_by_substring() -> None:
    texts = ["It understands, ears up", "a red ear, a red ear", "Stand stand stand", "red"]
    by_word = prototypes_of(texts).clusters[0]
    assert (by_word.key, by_word.score, by_word.keywords[:3]) == ("b", 5, [("red", 3), ("stand", 3), ("ear", 2)])
    by_substring = prototypes_of(texts, matching="substring").clusters[0]
    assert (by_substring.key, by_substring.score) == ("a", 3 + 2 + 1 + 1)  # stand, ear, ears, understands
    with pytest.raises(ValueError, match="matching"):
        prototypes_of(texts, matching="fuzzy")


def test_a_keyword_counts_once_per_description() -> None:
    chosen = prototypes_of(["fur fur fur fur", "fur and tail", "ears"], [0, 0, 1]).clusters[0]
    assert (chosen.key, chosen.score) == ("b", 6)


def test_ties_go_to_the_smallest_key() -> None:
    words = count_words(["n2/b", "n1/z", "n2/a"], ["fur", "fur", "fur"])
    assert text_prototypes(words, [0, 0, 0], "dog", n_clusters=1, beta=1.0).clusters[0].key is None  # all hold it
    words = count_words(["n2/b", "n1/z", "n2/a", "n0"], ["fur", "fur", "fur", "tail"])
    assert text_prototypes(words, [0, 0, 0, 1], "dog", n_clusters=2, beta=1.0).clusters[0].key == "n1/z"


def test_a_class_whose_words_are_all_common_falls_back() -> None:
    result = prototypes_of(["brown dog", "the dog, brown", "Brown dog"], [0, 0, 1], beta=0.7)
    assert result.nonrepresentative == ["brown", "dog"]
    assert result.clusters == [ClusterText(None, None, 0, [], 2), ClusterText(None, None, 0, [], 1)]
    assert all(cluster.fallback for cluster in result.clusters)


def test_text_prototypes_at_the_edges() -> None:
    result = prototypes_of(["", "犬は茶色 fur"], [0, 1], "dog", n_clusters=3)
    assert [c.fallback for c in result.clusters] == [True, False, True]
    assert [c.size for c in result.clusters] == [1, 1, 0]
    assert result.clusters[1].description == "犬は茶色 fur"
    assert dict(result.clusters[1].keywords) == {"犬は茶色": 1, "fur": 1}
    with pytest.raises(ValueError, match="2 and 1"):
        count_words(["a", "b"], ["x"])
    with pytest.raises(ValueError, match="1 and 2"):
        text_prototypes(count_words(["a", "b"], ["x", "y"]), [0], "dog", n_clusters=2)
    for label in (2, -1):
        with pytest.raises(ValueError, match=f"'b' has cluster {label}"):
            text_prototypes(count_words(["a", "b"], ["x", "y"]), [0, label], "dog", n_clusters=2)


def test_a_class_sized_set() -> None:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(800)]
    texts = [" ".join(rng.choices(vocabulary, k=100)) for _ in range(1280)]
    labels = [rng.randrange(50) for _ in texts]
    keys = [f"{i:06d}" for i in range(1280)]
    result = text_prototypes(count_words(keys, texts), labels, "dog", n_clusters=50)
    assert sum(c.size for c in result.clusters) == 1280
    for number, cluster in enumerate(result.clusters):
        members = [i for i, label in enumerate(labels) if label == number]
        counts = Counter(word for i in members for word in texts[i].split())
        assert len(cluster.keywords) == 30
        assert all(counts[word] == count for word, count in cluster.keywords)
        assert keys.index(cluster.key or "") in members


def test_prompts_of_the_ablation() -> None:
    given = {"class_name": CLASS_NAME, "description": "A long dog.", "keywords": ["fur", "tail"]}
    assert prompt_for("L", **given) == CLASS_NAME
    assert prompt_for("L+FK", **given) == "Saluki, gazelle hound, fur, tail"
    assert prompt_for("DCS", **given) == "A long dog."
    assert prompt_for("DCS", **{**given, "description": None}) == CLASS_NAME
    assert prompt_for("L+FK", **{**given, "keywords": []}) == CLASS_NAME
    assert prompt_for("GGS", **given) == template_sentence(CLASS_NAME, ["fur", "tail"])
    with pytest.raises(ValueError, match="unknown prompt strategy 'X'"):
        prompt_for("X", **given)  # type: ignore[arg-type]


def test_template_sentence() -> None:
    assert template_sentence("church", []) == "The image shows the church."
    assert template_sentence("church", ["spire"]).endswith("by these features: spire.")
    words = [f"word{c}" for c in "abcdefghijklmn"]
    sentence = template_sentence("church", words)
    assert sentence.endswith("wordi and wordj.") and "wordk" not in sentence
