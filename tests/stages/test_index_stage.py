"""index: what the worker leaves is the index of the source, with news of how far the listing is."""

import pytest

from vlcp_dist import config
from vlcp_dist.data.index import Index
from vlcp_dist.errors import InputError
from vlcp_dist.stages import index
from vlcp_dist.stages.base import make_run


@pytest.fixture
def run(micro, tmp_path):
    """A run on an image folder of three classes of ten images; the index does not open them."""
    for class_id in ("cat", "dog", "owl"):
        for i in range(10):
            path = tmp_path / "images" / class_id / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def load(*overrides: str):
        data = ["data.source=imagefolder", f"data.path={tmp_path / 'images'}", "data.limit_per_class=null"]
        cfg: config.Config = micro(*data, "data.shard_size=5", *overrides)
        return make_run(cfg, [index.STAGE])

    return load


def test_the_worker_indexes_the_source_and_tells_how_far_it_is(run, tmp_path):
    run = run("data.validation=0.1")
    worker, (unit,) = index.Worker(run), index.units(run)
    outcome = worker.process(unit, worker.read(unit))
    assert outcome.n_in == 30 and not outcome.failed
    beat = run.folders["index"].last_heartbeat()
    assert beat is not None and (beat["phase"], beat["step"], beat["steps"]) == ("scan", 3, 3)
    for name, content in outcome.files.items():
        (tmp_path / name).write_bytes(content)
    found = Index.load(tmp_path)
    assert found.class_sizes == {"cat": 7, "dog": 7, "owl": 7}
    assert found.shards == {"000000": 5, "000001": 5, "000002": 5, "000003": 5, "000004": 1}
    assert found.split_sizes == {"train": 21, "validation": 3, "test": 6}
    assert {path.read_bytes() for path in map(tmp_path.joinpath, outcome.files)} == set(outcome.files.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(["ipc=[7]"], "class cat .* has 7 training images, 6 after outlier removal, fewer than ipc 7"),
     (["data.limit_per_class=1"], "class cat .* has 1 training image.*at least 2")],
)  # fmt: skip
def test_classes_that_are_too_small_are_refused(run, tmp_path, overrides, words):
    run = run("data.validation=0.1", *overrides)
    outcome = index.Worker(run).process(index.units(run)[0], None)
    for name, content in outcome.files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        index.check_sizes(run.cfg, Index.load(tmp_path))
