"""Class lists: names by id in every form of listing, the public subsets, and errors that name what is wrong."""

import re

import pytest

from vlcp_dist.data.classes import (
    SUBSETS,
    ClassInfo,
    SourceError,
    find_listing,
    id_of,
    ids_of_labels,
    load_classes,
    read_listing,
    select_ids,
)

CRANES = "n02012849 crane\nn02091831 Saluki, gazelle hound\nn03126707 crane\n"


@pytest.fixture
def listing(tmp_path):
    def write(text, name="classes.txt"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_subsets_are_the_published_ones():
    assert {name: len(set(ids)) for name, ids in SUBSETS.items()} == {
        "imagenette": 10,
        "imagewoof": 10,
        "imageidc": 10,
        "imagenet100": 100,
    }
    assert all(re.fullmatch(r"n\d{8}", id) and len(ids) == len(set(ids)) for ids in SUBSETS.values() for id in ids)
    assert "n02102040" in SUBSETS["imagenette"]  # English springer
    assert "n02099601" in SUBSETS["imagewoof"]  # golden retriever


def test_names_from_ids_without_a_listing():
    assert load_classes(["red_fox", "digit-0"], listing=None) == [
        ClassInfo("digit-0", "digit 0"),
        ClassInfo("red_fox", "red fox"),
    ]


def test_wnids_need_names():
    with pytest.raises(SourceError, match=r"n02091831.*LOC_synset_mapping\.txt"):
        load_classes(["n02091831"], listing=None)


@pytest.mark.parametrize("id", ["../up", "birds/crane", ".hidden", "..", "", "a\nb", "é" * 101])
def test_an_id_that_is_no_file_name_is_refused(id):
    with pytest.raises(SourceError, match="class ids name files"):
        load_classes(["fine", id], listing={"fine": "fine", id: "a name"})


def test_imagenet_listing_by_id_not_by_position(listing):
    path = listing(CRANES, "LOC_synset_mapping.txt")
    assert load_classes(["n03126707", "n02091831"], listing=path) == [
        ClassInfo("n02091831", "Saluki, gazelle hound"),
        ClassInfo("n03126707", "crane"),
    ]


def test_two_ids_may_share_a_name(listing):
    assert [info.name for info in read_listing(listing(CRANES))].count("crane") == 2


@pytest.mark.parametrize(
    ("text", "ids", "expected"),
    [
        ("b\tblue jay\na\tred fox\n", ["a", "b"], [("a", "red fox"), ("b", "blue jay")]),
        ("b blue jay\na red fox\n", ["a", "b"], [("a", "red fox"), ("b", "blue jay")]),
        ("dog\ncat\n", ["cat", "dog"], [("cat", "cat"), ("dog", "dog")]),
        ("great white shark\ncat\n", ["great_white_shark"], [("great_white_shark", "great white shark")]),
        ("\ufeffcat\r\ndog\r\n\r\n", ["dog"], [("dog", "dog")]),
    ],
    ids=["tab", "space", "names", "long names", "BOM and CRLF"],
)
def test_forms_of_a_listing(listing, text, ids, expected):
    assert load_classes(ids, listing=listing(text)) == [ClassInfo(*pair) for pair in expected]


def test_names_from_a_mapping():
    assert load_classes(["n02091831"], listing={"n02091831": "Saluki", "other": "x"}) == [
        ClassInfo("n02091831", "Saluki")
    ]
    with pytest.raises(SourceError, match=r"0 of 1 classes.*missing zebra"):
        load_classes(["zebra"], listing={"cat": "cat"})


def test_ids_missing_from_the_listing_are_named(listing):
    path = listing("cat\ndog\n")
    with pytest.raises(SourceError, match=r"classes\.txt: 1 of 2 classes.*missing zebra"):
        load_classes(["cat", "zebra"], listing=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat\ndog\ncat\n", "more than once: cat"),
        ("a\tcat\na\tdog\n", "more than once: a"),
        ("a\tcat\ndog\n", "line 2 has no name"),
        ("n02091831\nn02012849\n", "line 1 has no name"),
    ],
)
def test_bad_listings(listing, text, message):
    path = listing(text)
    with pytest.raises(SourceError, match=f"classes.txt.*{message}"):
        read_listing(path)


def test_listing_that_is_no_text(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SourceError, match=r"classes\.txt: not UTF-8"):
        read_listing(tmp_path / "classes.txt")


def test_find_listing_prefers_classes_txt(listing, tmp_path):
    assert find_listing(tmp_path) is None
    imagenet = listing(CRANES, "LOC_synset_mapping.txt")
    assert find_listing(tmp_path) == imagenet
    own = listing("cat\n")
    assert find_listing(tmp_path) == own


def test_select_by_list_and_by_subset():
    ids = [*SUBSETS["imagenette"], "zebra"]
    assert select_ids(ids, "imagenette") == sorted(SUBSETS["imagenette"])
    assert select_ids(ids, ["zebra", "n01440764"]) == ["n01440764", "zebra"]
    assert select_ids(["b", "a", "b"], None) == ["a", "b"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["cat", "zebra", "yak"], r"found 1 of 3; the data has no zebra, yak \(its 2 classes: cat, dog\)"),
        ("imagewoof", r"imagewoof: found 0 of 10; the data has no n02086240.* and 2 more"),
        ("imagenete", r"unknown class subset 'imagenete' \(did you mean imagenette\?\)"),
        ([], "empty list"),
        (["cat", "cat"], "more than once: cat"),
    ],
)
def test_bad_selections(wanted, message):
    with pytest.raises(SourceError, match=message):
        select_ids(["cat", "dog"], wanted)


def test_labels_by_id_name_and_number(listing):
    path = listing("b\tblue jay\na\tred fox\n")
    labels = dict.fromkeys(["a", "blue jay", "1"], "x.tar: 0")
    assert ids_of_labels(labels, listing=path) == {"a": "a", "blue jay": "b", "1": "a"}


def test_numbers_that_are_ids_are_ids(listing):
    path = listing("1 one\n0 zero\n")
    assert ids_of_labels({"0": "", "1": ""}, listing=path) == {"0": "0", "1": "1"}
    assert ids_of_labels({"1": ""}, listing={"1": "one"}) == {"1": "1"}


def test_labels_without_a_listing_are_names():
    assert ids_of_labels({"great white shark": "", "n02091831": ""}, listing=None) == {
        "great white shark": "great_white_shark",
        "n02091831": "n02091831",
    }


@pytest.mark.parametrize(
    ("labels", "text", "message"),
    [
        (["3"], None, r"x\.tar: 0: the label 3 is a number.*classes\.txt"),
        (["a b", "a/b"], None, "'a b' makes the same"),
        (["???"], None, "no class id"),
        (["2"], "cat\ndog\n", "'2' is no id .*2 lines"),
        (["yak"], "cat\ndog\n", "'yak' is no id"),
        (["crane"], CRANES, "'crane' is no id and no unique name"),
    ],
)
def test_bad_labels(listing, labels, text, message):
    path = listing(text) if text else None
    with pytest.raises(SourceError, match=message):
        ids_of_labels(dict.fromkeys(labels, "x.tar: 0"), listing=path)


def test_id_of():
    assert id_of("Saluki, gazelle hound") == "Saluki_gazelle_hound"
