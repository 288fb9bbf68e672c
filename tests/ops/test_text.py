"""Text prototypes against an independent, plain reading of Algorithm 2, and the prompts made of them."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcp_dist.ops.text import (
    ClusterText,
    clean_description,
    keywords,
    nonrepresentative_words,
    prompt_for,
    stop_words,
    template_sentence,
    text_prototype,
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
        [key for key, _, _ in items],
        [text for _, text, _ in items],
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


def test_nonrepresentative_words_are_those_of_at_least_beta() -> None:
    descriptions = ["the dog is brown brown brown", "the dog is white", "the Dog is brown", "a cat"]
    assert nonrepresentative_words(descriptions, 0.75) == ["dog"]  # held by exactly 3 of 4
    assert nonrepresentative_words(descriptions, 0.5) == ["brown", "dog"]
    assert nonrepresentative_words(descriptions, 0.76) == []
    assert nonrepresentative_words([], 0.7) == []
    for beta in (0, -1, 1.1):
        with pytest.raises(ValueError, match="beta"):
            nonrepresentative_words(descriptions, beta)


def test_beta_is_met_by_exact_shares() -> None:
    for tenths in range(1, 11):
        descriptions = ["fur"] * tenths + ["tail"] * (10 - tenths)
        assert "fur" in nonrepresentative_words(descriptions, tenths / 10)


def test_keywords_count_every_occurrence_and_break_ties_by_alphabet() -> None:
    cluster = ["Fur fur fur, and a tail", "ears, tail; the zebra hound's eyes", "gaze"]
    assert keywords(cluster, {"ears"}, CLASS_NAME, 10) == [("fur", 3), ("tail", 2), ("eyes", 1), ("zebra", 1)]
    assert keywords(cluster, (), CLASS_NAME, 2) == [("fur", 3), ("tail", 2)]
    assert keywords([], (), CLASS_NAME, 5) == []
    with pytest.raises(ValueError, match="at least 1"):
        keywords(cluster, (), CLASS_NAME, 0)


def test_matching_by_word_or_by_substring() -> None:
    table = [("stand", 5), ("ear", 3), ("red", 1)]
    texts = ["It understands, ears up", "a red ear, a red ear", "Stand"]
    by_word = text_prototype(["a", "b", "c"], texts, table)
    assert (by_word.key, by_word.score) == ("c", 5)
    by_substring = text_prototype(["a", "b", "c"], texts, table, matching="substring")
    assert (by_substring.key, by_substring.score) == ("a", 8)
    with pytest.raises(ValueError, match="matching"):
        text_prototype(["a"], ["x"], table, matching="fuzzy")  # type: ignore[arg-type]


def test_a_keyword_counts_once_per_description() -> None:
    chosen = text_prototype(["a", "b"], ["fur fur fur fur", "fur and tail"], [("fur", 5), ("tail", 1)])
    assert (chosen.key, chosen.score) == ("b", 6)


def test_ties_go_to_the_smallest_key() -> None:
    texts = ["fur", "fur", "fur"]
    assert text_prototype(["n2/b", "n1/z", "n2/a"], texts, [("fur", 3)]).key == "n1/z"


def test_nothing_that_scores_falls_back() -> None:
    expected = ClusterText(key=None, description=None, score=0, keywords=[], size=2)
    assert text_prototype(["a", "b"], ["", "the of"], []) == expected
    assert expected.fallback
    empty = text_prototype([], [], [])
    assert empty.fallback and empty.size == 0


def test_text_prototypes_at_the_edges() -> None:
    result = text_prototypes(["a", "b"], ["", "犬は茶色 fur"], [0, 1], "dog", n_clusters=3)
    assert [c.fallback for c in result.clusters] == [True, False, True]
    assert result.clusters[1].description == "犬は茶色 fur"
    assert dict(result.clusters[1].keywords) == {"犬は茶色": 1, "fur": 1}
    with pytest.raises(ValueError, match="2, 1 and 2"):
        text_prototypes(["a", "b"], ["x"], [0, 1], "dog", n_clusters=2)
    for label in (2, -1):
        with pytest.raises(ValueError, match=f"'b' has cluster {label}"):
            text_prototypes(["a", "b"], ["x", "y"], [0, label], "dog", n_clusters=2)


def test_a_class_sized_set() -> None:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(800)]
    texts = [" ".join(rng.choices(vocabulary, k=100)) for _ in range(1280)]
    labels = [rng.randrange(50) for _ in texts]
    keys = [f"{i:06d}" for i in range(1280)]
    result = text_prototypes(keys, texts, labels, "dog", n_clusters=50)
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
