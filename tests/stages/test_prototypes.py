"""On latents of real digits the prototypes are what scikit-learn and a plain reading of Algorithm 2 give."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.cluster import KMeans
from sklearn.neighbors import LocalOutlierFactor

from vlcp_dist import config, pipeline
from vlcp_dist.engine.serial import SerialEngine
from vlcp_dist.ops.text import stop_words
from vlcp_dist.stages import base

MICRO = Path(__file__).parents[1] / "micro.yaml"
IPC = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All training digits, encoded by an autoencoder that has learned something, and their prototypes."""
    cfg = config.load(
        MICRO,
        [
            f"root={tmp_path_factory.mktemp('run')}",
            f"ipc=[{IPC}]",
            "data.limit_per_class=null",
            "pretrain.vae_steps=60",
        ],
    )
    plan = {stage.name: stage for stage in pipeline.stages(cfg)}
    run = base.make_run(cfg, list(plan.values()))
    engine = SerialEngine(max_retries=0)
    for name in ("index", "caption", "pretrain", "encode", "pack", "prototypes"):
        events = []
        engine.run(plan[name].job(run), plan[name].units(run), events.append)
        assert {event.kind for event in events} == {"done"}, events[-1].message
    return run


def of_class(run, class_id):
    """Keys, latents (n, d), descriptions, and what the stage left."""
    rows = run.index.of_class(class_id)
    latents, texts = run.latents(run.index.shards), run.descriptions(run.index.shards)
    x = np.stack([latents[row.key].astype(np.float32).ravel() for row in rows])
    folder = run.folders["prototypes"].path / f"ipc={IPC}"
    table = json.loads((folder / f"{class_id}.json").read_text())
    centers = load_file(folder / f"{class_id}.safetensors")["centers"]
    return [row.key for row in rows], x, texts, table, centers


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
