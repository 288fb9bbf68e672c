"""Every class's latents in one file, on disks and object stores; a latent that is missing is named with its reason."""

import io

import numpy as np
import pytest
from PIL import Image

from runs import MICRO
from vlcp_dist import config, pipeline
from vlcp_dist.stages import base


def test_packs_of_a_run_are_its_latents(whole):
    latents = whole.latents(whole.index.shards)
    for class_id in whole.index.class_sizes:
        pack = whole.pack(class_id)
        assert pack.keys == [row.key for row in whole.index.of_class(class_id)]
        assert pack.latents.tobytes() == b"".join(latents[key].tobytes() for key in pack.keys)


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("bucket") + "/run"


@pytest.fixture
def images(tmp_path):
    """Two classes of six images in shards of four; two files of the first class are no images."""
    for label, name in enumerate(("ant", "bee")):
        for i in range(6):
            for split in ("train", "test"):
                buffer = io.BytesIO()
                ramp = Image.linear_gradient("L").rotate(90).resize((32, 32))
                Image.merge("RGB", [ramp, Image.new("L", (32, 32), 40 * i), Image.new("L", (32, 32), 80 * label)]).save(
                    buffer, "PNG"
                )
                path = tmp_path / "images" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    b"no image" if (name, split) == ("ant", "train") and i in (1, 4) else buffer.getvalue()
                )
    return tmp_path / "images"


def run_of(root, images, whole, *overrides) -> base.Run:
    data = [
        "data.source=imagefolder",
        f"data.path={images}",
        "data.test=null",
        "data.validation=0",
        "data.shard_size=4",
    ]
    model = ["pretrain=null", f"diffusion.model={whole.diffusion_model}"]
    cfg = config.load(MICRO, [f"root={root}", "engine.kind=serial", *data, *model, *overrides])
    return base.make_run(cfg, pipeline.stages(cfg))


def test_an_image_without_a_latent_is_absent_and_reported(whole, images, root, do):
    run = run_of(root, images, whole, "encode.horizontal_flip=true")
    for stage in ("index", "encode"):
        assert {event.kind for event in do(run, stage)} == {"done"}
    ant, bee = (event.marker for event in do(run, "pack"))
    assert [failure["key"] for failure in ant["failed"]] == ["train-ant-1", "train-ant-4"]
    assert all("not a readable image" in failure["reason"] for failure in ant["failed"])
    assert (ant["n_in"], ant["n_ok"], bee["n_in"], bee["n_failed"]) == (6, 4, 6, 0)
    latents = run.latents(run.index.shards)
    for class_id, numbers in (("ant", (0, 2, 3, 5)), ("bee", range(6))):
        pack = run.pack(class_id)
        assert pack.keys == [f"train-{class_id}-{i}" for i in numbers]
        np.testing.assert_array_equal(pack.latents, np.stack([latents[key] for key in pack.keys]))
    mirrored = run.latents(run.index.shards, flipped=True)
    assert mirrored.keys() == latents.keys()
    assert all(np.abs(mirrored[key] - latents[key]).max() > 0.05 for key in latents)
    with pytest.raises(ValueError, match=r"encode\.horizontal_flip=true"):
        whole.latents([], flipped=True)


def test_a_class_without_any_latent_is_an_error(whole, images, tmp_path, do):
    for path in (images / "train" / "ant").iterdir():
        path.write_bytes(b"")
    run = run_of(tmp_path / "run", images, whole)
    for stage in ("index", "encode"):
        do(run, stage)
    events = do(run, "pack")
    assert [event.kind for event in events] == ["failed", "done"]
    assert "class ant: none of its 6 images has a latent (the first: empty file)" in events[0].message
