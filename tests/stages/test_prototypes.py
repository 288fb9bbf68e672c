"""On latents of real digits the prototypes are what scikit-learn and a plain reading of Algorithm 2 give.

One visit serves all IPCs asked for, a later one costs no more than its K-means, and what cannot be used is named.
"""

import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.cluster import KMeans
from sklearn.neighbors import LocalOutlierFactor

from vlcp_dist import config, pipeline
from vlcp_dist.data.manifest import StageFolder
from vlcp_dist.data.packs import ClassPack
from vlcp_dist.engine.serial import SerialEngine
from vlcp_dist.ops.text import stop_words
from vlcp_dist.stages import base

MICRO = Path(__file__).parents[1] / "micro.yaml"
IPC = 5


def do(run, name):
    """All units of a stage that are not done; the markers of these."""
    stage = next(stage for stage in pipeline.stages(run.cfg) if stage.name == name)
    events, done = [], run.folders[name].scan(stage.units(run)).done
    todo = [unit for unit in stage.units(run) if unit.name not in done]
    SerialEngine(max_retries=0).run(stage.job(run), todo, events.append)
    assert {event.kind for event in events} <= {"done"}, events[-1].message
    return {event.unit.name: event.marker for event in events}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """digits(*overrides) -> Run: all training digits, encoded by an autoencoder that has learned something, packed."""
    root = tmp_path_factory.mktemp("run")

    def load(*overrides):
        fixed = [f"root={root}", "engine.kind=serial", "data.limit_per_class=null", "pretrain.vae_steps=25"]
        cfg = config.load(MICRO, [*fixed, *overrides])
        return base.make_run(cfg, pipeline.stages(cfg))

    for name in ("index", "caption", "pretrain", "encode", "pack"):
        do(load(), name)
    return load


@pytest.fixture(scope="module")
def run(digits):
    """Their prototypes at two IPCs."""
    run = digits(f"ipc=[2,{IPC}]")
    do(run, "prototypes")
    return run


def of_class(run, class_id):
    """Keys, latents (n, d), descriptions, and what the stage left."""
    rows = run.index.of_class(class_id)
    latents, texts = run.latents(run.index.shards), run.descriptions(run.index.shards)
    x = np.stack([latents[row.key].astype(np.float32).ravel() for row in rows])
    table, centers = left(run, IPC, class_id)
    return [row.key for row in rows], x, texts, table, centers


def left(run, ipc, class_id):
    """The table and the centres of a class at an IPC."""
    folder = run.folders["prototypes"].path / f"ipc={ipc}"
    return json.loads((folder / f"{class_id}.json").read_text()), load_file(folder / f"{class_id}.safetensors")[
        "centers"
    ]


@pytest.fixture(params=[f"digit-{digit}" for digit in range(10)])
def case(run, request):
    return of_class(run, request.param)


def test_outliers_are_those_of_scikit_learn(case):
    keys, x, _, table, _ = case
    flags = LocalOutlierFactor(n_neighbors=10, contamination=0.1).fit_predict(x)
    expected = {key for key, flag in zip(keys, flags, strict=True) if flag == -1}
    assert {outlier["key"] for outlier in table["outliers"]} == expected
    assert table["images"] == len(keys)


def test_centres_are_means_and_as_good_as_the_best_of_ten(case):
    keys, x, _, table, centers = case
    where = {key: i for i, key in enumerate(keys)}
    inliers = [key for key in keys if key not in {o["key"] for o in table["outliers"]}]
    assert sorted(key for c in table["clusters"] for key in c["members"]) == sorted(inliers)
    inertia = 0.0
    for center, cluster in zip(centers.reshape(IPC, -1), table["clusters"], strict=True):
        members = x[[where[key] for key in cluster["members"]]]
        np.testing.assert_allclose(center, members.mean(0), atol=1e-4)
        inertia += ((members - center) ** 2).sum()
        distances = {key: ((x[where[key]] - center) ** 2).sum() for key in inliers}
        assert distances[cluster["nearest"]] == pytest.approx(min(distances.values()), rel=1e-4)
    best = KMeans(IPC, n_init=10, random_state=0).fit(x[[where[key] for key in inliers]]).inertia_
    assert inertia <= 1.01 * best


def test_text_prototypes_are_those_of_algorithm_2(case):
    """Written from the paper's steps, without the package's functions but for the list of stop words."""
    _, _, texts, table, _ = case
    members = [cluster["members"] for cluster in table["clusters"]]
    words = {key: re.findall(r"[a-z]+", texts[key].lower()) for group in members for key in group}
    df = Counter(word for found in words.values() for word in set(found))
    stop = stop_words()
    common = {word for word, count in df.items() if word not in stop and count / len(words) >= 0.7}
    assert set(table["nonrepresentative"]) == common
    for cluster, group in zip(table["clusters"], members, strict=True):
        counts = Counter(
            word
            for key in group
            for word in words[key]
            if word not in stop and word not in common and word not in table["class_name"]
        )
        top = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:30])
        assert dict(map(tuple, cluster["keywords"])) == top
        scores = {key: sum(top[word] for word in set(words[key]) if word in top) for key in group}
        best = min(group, key=lambda key: (-scores[key], key))
        assert (cluster["key"], cluster["score"]) == (best, scores[best])
        assert cluster["description"] == texts[best]


def test_one_visit_to_a_class_serves_all_ipcs_and_a_later_one_redoes_nothing_above_k_means(digits, run, tmp_path):
    folder = run.folders["prototypes"]
    first = {name: folder.marker(name) for name in (f"ipc=2_{IPC}/digit-{d}" for d in range(10))}
    assert all(marker["info"]["lof"] == 1 for marker in first.values())
    larger = digits(f"ipc=[2,{IPC},8]")
    assert larger.folders["prototypes"].path == folder.path
    later = do(larger, "prototypes")
    assert sorted(later) == [f"ipc=8/digit-{d}" for d in range(10)]
    assert all(marker["info"]["lof"] == 0 for marker in later.values())
    assert {name: folder.marker(name) for name in first} == first
    assert do(larger, "prototypes") == do(digits("ipc=[8]"), "prototypes") == {}

    at_once = digits("ipc=[8]")
    at_once.folders["prototypes"] = StageFolder(tmp_path / "alone")
    alone = do(at_once, "prototypes")
    assert {n: m["files"] for n, m in alone.items()} == {n: m["files"] for n, m in later.items()}


def test_a_lost_file_costs_its_unit_and_no_lof(digits, run):
    do(digits("ipc=[3]"), "prototypes")
    path = run.folders["prototypes"].path / "ipc=2/digit-7.safetensors"
    before = path.read_bytes()
    path.unlink()
    again = do(digits(f"ipc=[2,3,{IPC}]"), "prototypes")
    assert list(again) == [f"ipc=2_{IPC}/digit-7"] and again[f"ipc=2_{IPC}/digit-7"]["info"]["lof"] == 0
    assert path.read_bytes() == before


def test_classes_worked_on_together_give_what_each_gives_alone(digits, run):
    together = digits(f"ipc=[2,{IPC}]", "prototypes.classes_per_unit=4")
    assert sorted(do(together, "prototypes")) == [f"ipc=2_{IPC}/000{i}" for i in range(3)]
    for digit in range(10):
        for ipc in (2, IPC):
            (one, centers), (other, others) = (left(r, ipc, f"digit-{digit}") for r in (run, together))
            assert one["clusters"] == other["clusters"] and one["outliers"] == other["outliers"]
            np.testing.assert_array_equal(centers, others)


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_other_backends_leave_the_same_outliers_and_as_good_clusters(digits, run, backend):
    if find_spec(backend) is None:
        pytest.skip(f"{backend}: not run, it is not installed")
    other = digits(f"ipc=[{IPC}]", f"prototypes.backend={backend}")
    assert other.folders["prototypes"].path != run.folders["prototypes"].path
    do(other, "prototypes")
    ratios = []
    for digit in range(10):
        (ours, _), (theirs, centers) = (left(r, IPC, f"digit-{digit}") for r in (run, other))
        assert [o["key"] for o in theirs["outliers"]] == [o["key"] for o in ours["outliers"]]
        assert centers.shape == (IPC, 4, 8, 8)
        ratios.append(theirs["inertia"] / ours["inertia"])
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)


def test_nested_prototypes_start_from_those_of_the_smaller_ipc(digits, run):
    assert "nested_in" not in left(run, IPC, "digit-0")[0]
    at_once, in_turn = digits(f"ipc=[2,{IPC}]", "prototypes.nested=true"), digits("ipc=[2]", "prototypes.nested=true")
    do(in_turn, "prototypes")
    smaller = {digit: left(in_turn, 2, f"digit-{digit}") for digit in range(10)}
    do(at_once, "prototypes")
    ratios = []
    for digit in range(10):
        table, _ = left(at_once, IPC, f"digit-{digit}")
        assert table["nested_in"] == 2 and "nested_in" not in smaller[digit][0]
        ratios.append(table["inertia"] / left(run, IPC, f"digit-{digit}")[0]["inertia"])
    assert 0.99 < np.mean(ratios) < 1.05


def test_d4m_is_mini_batches_without_outlier_removal(digits, run):
    d4m = digits(f"ipc=[{IPC}]", "prototypes.algorithm=minibatch", "prototypes.contamination=0")
    markers = do(d4m, "prototypes")
    assert all(marker["info"]["lof"] == marker["info"]["outliers"] == 0 for marker in markers.values())
    table, _ = left(d4m, IPC, "digit-3")
    assert table["outliers"] == []
    assert sum(len(cluster["members"]) for cluster in table["clusters"]) == table["images"]


def outcome(run, class_id, ipc=2):
    """What a worker makes of one class's unit at one IPC."""
    stage = next(stage for stage in pipeline.stages(run.cfg) if stage.name == "prototypes")
    worker = stage.worker(run)
    unit = next(unit for unit in stage.units(run) if unit.payload["classes"] == [class_id])
    return worker.process(unit, worker.read(unit))


def test_images_that_cannot_be_used_are_named(digits, monkeypatch, tmp_path):
    run = digits("ipc=[2]", "prototypes.beta=0.9")
    keys = run.pack("digit-4").keys
    pack, texts = base.Run.pack, base.Run.descriptions

    def broken_pack(self, class_id):
        latents = np.array(pack(self, class_id).latents)
        latents[3, 0, 0, 0], latents[5, 1, 2, 3] = np.nan, np.inf
        return ClassPack(keys[:-1], latents[:-1])

    monkeypatch.setattr(base.Run, "pack", broken_pack)
    monkeypatch.setattr(
        base.Run, "descriptions", lambda self, names: {k: t for k, t in texts(self, names).items() if k != keys[0]}
    )
    made = outcome(run, "digit-4")
    assert {failure.key: failure.reason for failure in made.failed} == {
        keys[0]: "it has no description",
        keys[3]: "its latent holds NaN or infinity",
        keys[5]: "its latent holds NaN or infinity",
        keys[-1]: "it has no latent",
    }
    table = json.loads(made.files["ipc=2/digit-4.json"])
    used = {key for c in table["clusters"] for key in c["members"]} | {o["key"] for o in table["outliers"]}
    assert used == set(keys) - {failure.key for failure in made.failed}

    monkeypatch.setattr(base.Run, "descriptions", lambda self, names: {})
    with pytest.raises(
        ValueError, match=r"class digit-4: none of its \d+ images can be used; the first, .*no description"
    ):
        outcome(run, "digit-4")


def test_few_identical_or_indistinct_images(digits, monkeypatch):
    pack, texts = base.Run.pack, base.Run.descriptions

    def few(self, class_id):
        keys, latents = pack(self, class_id)
        return ClassPack(keys[:6], np.repeat(latents[:1], 6, axis=0))

    monkeypatch.setattr(base.Run, "pack", few)
    monkeypatch.setattr(
        base.Run, "descriptions", lambda self, names: dict.fromkeys(texts(self, names), "a round digit")
    )
    with (
        pytest.warns(UserWarning, match="n_neighbors=10 but there are 6 points"),
        pytest.warns(UserWarning, match="fewer than k=2 distinct points"),
    ):
        made = outcome(digits("ipc=[2]", "prototypes.beta=0.8"), "digit-1")
    table = json.loads(made.files["ipc=2/digit-1.json"])
    assert table["outliers"] == [] and [c["size"] for c in table["clusters"]] == [5, 1]
    assert table["nonrepresentative"] == ["digit", "round"] and made.info["fallbacks"] == 2
    assert all(c["description"] is None for c in table["clusters"])
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"class digit-1 has 6 usable images .* fewer than ipc 7"),
    ):
        outcome(digits("ipc=[7]", "prototypes.beta=0.8"), "digit-1")


def test_settings_that_no_backend_has_are_refused(digits):
    for overrides in (
        ["prototypes.backend=faiss", "prototypes.algorithm=minibatch"],
        ["prototypes.backend=sklearn", "prototypes.nested=true"],
    ):
        with pytest.raises(config.ConfigError, match="needs backend torch"):
            digits(*overrides)
    assert digits("prototypes.backend=auto").cfg == digits().cfg
