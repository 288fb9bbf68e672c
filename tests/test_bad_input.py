"""Bad input: refused with a message that names it, or left out, counted and listed; never silently dropped."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vlcp_dist import pipeline
from vlcp_dist.data import shards, storage
from vlcp_dist.engine.progress import Progress
from vlcp_dist.errors import ConfigError, InputError, StageFailed

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a hundred bytes that claims 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty real digits a class as an image folder."""
    digits = load_digits()
    for digit, name in enumerate(NAMES):
        target = tmp_path / "images" / f"digit_{name}"
        target.mkdir(parents=True)
        for i in np.flatnonzero(digits.target == digit)[:20]:
            image = Image.fromarray((digits.images[i] * 15).astype(np.uint8)).resize((32, 32))
            (target / f"{i:04d}.png").write_bytes(encoded(image))
    return tmp_path / "images"


@pytest.fixture
def config_of(micro, folder):
    return lambda *overrides: micro("data.source=imagefolder", f"data.path={folder}", *overrides)


def run(cfg):
    return pipeline.run(cfg, Progress())


def test_odd_images_are_used_and_broken_ones_listed(config_of, folder):
    target = folder / "digit_zero"
    good = encoded(Image.new("RGB", (40, 30), "red"), "JPEG")
    odd = {
        "cmyk.jpg": encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG"),
        "deep.png": encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16))),
        "pixel.png": encoded(Image.new("RGB", (1, 1))),
        "palette.png": encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)).quantize()),
    }
    broken = {"cut.jpg": good[: len(good) // 2], "text.png": b"not an image", "bomb.png": bomb(), "empty.jpg": b""}
    for name, data in (odd | broken).items():
        (target / name).write_bytes(data)

    # All of them in the training part, so that each one is captioned and encoded.
    cfg = config_of("data.validation=0", "data.test=0.01", "data.limit_per_class=null", "max_failed_samples=3")
    with pytest.raises(StageFailed, match="4 samples failed, more than max_failed_samples=3") as caught:
        run(cfg)
    assert all(Path(name).stem in str(caught.value) for name in broken)

    # Once a file is mended the same command goes on from there.
    (target / "cut.jpg").write_bytes(good)
    with pytest.raises(StageFailed, match="3 samples failed, more than max_failed_samples=2"):
        run(config_of("data.validation=0", "data.test=0.01", "data.limit_per_class=null", "max_failed_samples=2"))
    (target / "cut.jpg").write_bytes(good[: len(good) // 2])

    cfg = config_of("data.validation=0", "data.test=0.2", "data.limit_per_class=null", "max_failed_samples=4")
    states = run(cfg)
    failed = {Path(f["source"]).name: f["reason"] for f in pipeline.failures(states)}
    assert set(failed) <= set(broken) and all(failed.values())
    captioned = {
        key for path in Path(cfg.root).glob("caption-*/*.tar") for key, _ in shards.read(path)
    }  # of both settings: the folders live side by side
    assert all(any(Path(name).stem in key for key in captioned) for name in odd)
    index = next(s for s in states if s.stage.name == "index")
    assert index.markers["index"]["n_in"] == 208
    # A mended image changes what was made without it: that is set aside and made anew.
    for name in failed:
        (target / name).write_bytes(good)
    cfg = cfg.model_copy(update={"max_failed_samples": len(failed) - 1})
    assert pipeline.failures(run(cfg)) == []
    root = Path(cfg.root)
    made_from_captions = {"pretrain", "encode", "pack", "finetune", "prototypes", "synthesize", "baselines", "evaluate"}
    assert {path.name.split("-")[0] for path in root.glob("*.superseded-1")} == made_from_captions
    for stage in ("caption", "encode"):
        markers = next(s for s in states if s.stage.name == stage).markers.values()
        assert all(m["n_in"] == m["n_ok"] + m["n_failed"] for m in markers)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.path=/no/such/folder"], ["/no/such/folder"]),
        (["ipc=[1,40]"], ["digit_eight", "fewer than ipc 40", "smaller ipc"]),
        (["ipc=[11]", "data.limit_per_class=12"], ["digit_eight", "10 after outlier removal", "fewer than ipc 11"]),
        (["data.test=null"], ["no test split", "data.test"]),
        (["data.classes=[digit_zero,digit_ten]"], ["digit_ten"]),
        (["data.source=digits"], ["path"]),
    ],
)
def test_input_that_cannot_work_is_refused_before_anything_is_spent(config_of, overrides, words):
    cfg = config_of(*overrides)
    with pytest.raises((StageFailed, ValueError)) as caught:
        run(cfg)
    assert all(word in str(caught.value) for word in words)
    assert not list(Path(cfg.root).glob("caption-*"))


def test_two_runs_on_one_root(config_of):
    cfg = config_of()
    Path(cfg.root).mkdir()
    with storage.exclusive(Path(cfg.root) / "lock"), pytest.raises(InputError, match="in use by process"):
        run(cfg)


def test_a_job_does_not_write_into_its_uploaded_copy(micro, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as Ray sets it for the command of a job
    with pytest.raises(ConfigError, match=r"root=runs/a .*absolute path that all nodes share"):
        run(micro(root=Path("runs/a")))


def test_an_empty_folder_and_a_class_with_one_image(config_of, folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises((StageFailed, ValueError), match="nothing"):
        run(config_of(f"data.path={tmp_path / 'nothing'}"))
    (folder / "digit_lonely").mkdir()
    (folder / "digit_lonely" / "a.png").write_bytes(encoded(Image.new("RGB", (32, 32))))
    with pytest.raises(ValueError, match=r"digit_lonely .* has 1 training image.*at least 2"):
        run(config_of())


def test_a_source_with_its_own_test_split(config_of, folder):
    train, test = folder / "train", folder / "val"
    train.mkdir()
    for path in sorted(folder.glob("digit_*")):
        path.rename(train / path.name)
        (test / path.name).mkdir(parents=True)
        for image in sorted((train / path.name).iterdir())[:5]:
            image.rename(test / path.name / image.name)
    with pytest.raises((StageFailed, ValueError), match="test split of its own"):
        run(config_of())
    states = run(config_of("data.test=null", "synthesize.strategies=[DCS]", "ipc=[1]", "evaluate.baselines=[]"))
    record = json.loads(next(states[-1].folder.path.glob("DCS/ipc=1/convnet3/epochs=2/seed=0.json")).read_text())
    assert record["test_images"] == 50


def test_names_and_descriptions_beyond_ascii(config_of, tmp_path):
    names = {f"digit_{name}": f"chiffre « {name} » 数字 é" for name in NAMES}
    states = run(
        config_of(f"data.class_names={json.dumps(names, ensure_ascii=False)}", "ipc=[1]", "evaluate.baselines=[]")
    )
    metadata = next(states[7].folder.path.glob("DCS/ipc=1/train/digit_two/metadata.jsonl")).read_text()
    assert "数字" in json.loads(metadata)["prompt"]


def test_empty_descriptions_are_failures(config_of, tmp_path):
    from vlcp_dist.models.tiny_llava import build_tiny_llava

    model = tmp_path / "llava"
    build_tiny_llava(model)
    settings = json.loads((model / "generation_config.json").read_text())
    settings["forced_eos_token_id"] = settings["eos_token_id"]  # the one token it may write is the end
    (model / "generation_config.json").write_text(json.dumps(settings))
    cfg = config_of("caption.captioner=llava", f"caption.model={model}", "caption.max_new_tokens=1")
    with pytest.raises(StageFailed, match="empty description"):
        run(cfg)
