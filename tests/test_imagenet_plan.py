"""configs/imagenet1k.yaml against an index of ImageNet's size: what it would do is known before there is an image."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from runs import vlcp
from vlcp_dist import config, pipeline
from vlcp_dist.data.classes import ClassInfo
from vlcp_dist.data.index import Row, files
from vlcp_dist.data.manifest import Outcome, Unit
from vlcp_dist.stages import base

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet1k.yaml"
TRAIN, TEST, CLASSES = 1_281_167, 50_000, 1000


def table(shard_size: int) -> pa.Table:
    """The columns of an index as the index stage makes it, without a listing of archives."""

    def split(name: str, n: int) -> pa.Table:
        wnid = np.sort(np.arange(n) % CLASSES)
        class_ids = pa.array(np.char.mod("n%08d", np.arange(CLASSES))).take(pa.array(wnid))
        numbers = pa.array(np.arange(n).astype(str))
        keys = pa.compute.binary_join_element_wise(pa.scalar(f"{name}_"), class_ids, numbers, "_")
        shards = np.char.zfill((np.arange(n) // shard_size).astype(str), 6) if name == "train" else np.full(n, "")
        columns = [keys, class_ids, pa.array(np.full(n, name)), keys, pa.array(shards)]
        return pa.table([column.cast(pa.string()) for column in columns], Row._fields)

    return pa.concat_tables([split("train", TRAIN), split("test", TEST)]).combine_chunks()


def test_the_plan_of_imagenet(tmp_path):
    cfg = config.load(CONFIG, [f"root={tmp_path}"])
    run = base.make_run(cfg, pipeline.stages(cfg))
    classes = [ClassInfo(f"n{i:08d}", f"class {i}") for i in range(CLASSES)]
    index = files(table(cfg.data.shard_size), classes, shard_size=cfg.data.shard_size)
    run.folders["index"].commit(Unit("index", 0), Outcome(index, TRAIN + TEST), seconds=0.0)

    rows = json.loads(vlcp("plan", "-c", str(CONFIG), f"root={tmp_path}", "--json").stdout)
    plan = {row["stage"]: (row["done"], row["units"], row["samples_left"]) for row in rows}
    assert plan["index"] == (1, 1, 0)
    for stage in ("caption", "encode"):
        assert plan[stage] == (0, 641, TRAIN)
    assert plan["prototypes"][:2] == (0, CLASSES)  # a class at both IPCs
    assert plan["synthesize"] == (0, 100 + 500, 60 * CLASSES)
    assert plan["evaluate"][:2] == (0, 2 * 3)
    assert "pretrain" not in plan
