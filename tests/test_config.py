"""The configuration refuses what cannot run, with a message that names the way out."""

import json
import re
import runpy
from pathlib import Path

import pytest

from vlcp_dist import config, pipeline, schema
from vlcp_dist.errors import ConfigError
from vlcp_dist.stages import base

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ipcs=[1]", ["ipcs", "did you mean 'ipc'"]),
        ("caption.batchsize=3", ["caption.batchsize", "did you mean 'batch_size'"]),
        ("prototypes.contamination=0.9", ["prototypes.contamination", "0.9", "less than or equal to 0.5"]),
        ("ipc=[0]", ["ipc.0", "greater than or equal to 1"]),
        ("ipc=[]", ["ipc", "at least 1"]),
        ("ipc=[5,5]", ["ipc", "twice"]),
        ("synthesize.strategies=[DCS,XYZ]", ["synthesize.strategies.1", "XYZ"]),
        ("data.source=imagefolder", ["data.path is needed"]),
        ("caption.prompt=Describe it.", ["{class_name}"]),
        ("diffusion.model=some/model", ["either diffusion.model", "or a pretrain section"]),
        ("pretrain=null", ["either diffusion.model", "or a pretrain section"]),
        ("evaluate.nets=[resnet10]", ["evaluate.nets.0", "resnet10", "resnet18"]),
        (
            "evaluate.nets=[resnet50]",
            ["resnet50 is no net of the hard-label protocol", "convnet6", "evaluate.protocol"],
        ),
        ("evaluate.teacher.epochs=5", ["evaluate.teacher has no meaning in the hard-label protocol"]),
        (
            "evaluate={protocol: soft, nets: [resnet18, resnetap10]}",
            ["resnetap10 is no net of the soft-label protocol", "resnet18-cifar"],
        ),
        ("evaluate={protocol: soft, lighting: 0.2}", ["evaluate.lighting has no meaning in the soft-label protocol"]),
        ("evaluate.epochs={1: 5}", ["evaluate.epochs has no entry for [2]"]),
        ("synthesize.strategies=[L,L]", ["synthesize.strategies", "twice"]),
        ("synthesize.num_inference_steps=1", ["leaves no step to run"]),
        ("data.validation=0.9", ["data.validation and data.test leave no training images"]),
        (
            "finetune.workers=3",
            ["finetune.batch_size 16", "finetune.workers 3", "batch_size 15 or 18, or workers 2 or 4"],
        ),
        ("finetune.workers=32", ["batch_size 32, or workers 16"]),
        ("finetune.deepspeed=zero3", ["zero1, zero2, zero2_offload"]),
        ("finetune.deepspeed={zero_optimization: {stage: 3}}", ["stage is 3", "1 or 2"]),
        ("finetune.deepspeed={zero_optimization: {stage: 1}, fp16: {}}", ["fp16 is set by fine-tuning"]),
        ("root", ["'root'", "key=value"]),
        ("seed.x=1", ["seed holds a value"]),
    ],
)
def test_bad_values_are_named(micro, override, words):
    with pytest.raises(ConfigError) as caught:
        micro("seed=0", override)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("root", "s3://AKIAEXAMPLE:hunter2@bucket/run"),
        ("root", "https://account.blob.example.com/run?sv=1&sig=hunter2"),
        ("data.path", "s3://bucket/images?X-Amz-Signature=hunter2"),
        ("data.class_names", "https://hunter2@example.com/names.txt"),
        ("diffusion.model", "https://example.com/model?access_token=hunter2"),
        ("engine.address", "redis://:hunter2@head:6379"),
        ("caption.model", "https://user:hunter2@example.com/m"),
    ],
)
def test_credentials_in_urls_are_refused_and_not_repeated(micro, key, url):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)} holds a URL with a credential") as caught:
        micro(f"{key}={url}")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^--config holds") as caught:
        config.load(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/a@b/run", "s3://bucket/monkey=1", "gs://bucket/x?generation=1"])
def test_urls_that_only_look_odd_are_taken(micro, url):
    assert micro(f"root={url}").root == url


def test_missing_file_and_bad_yaml(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the config"):
        config.load(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(bad)
    bad.write_text("- a list")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        config.load(bad)


def test_overrides_reach_nested_values(micro):
    cfg = micro("ipc=[3,4]", "prototypes.beta=0.2", "engine.workers=7")
    assert (cfg.ipc, cfg.prototypes.beta, cfg.engine.workers) == ([3, 4], 0.2, 7)


def test_an_engine_can_be_named_alone(micro):
    assert micro("engine=serial").engine == schema.Engine(kind="serial")
    with pytest.raises(ConfigError, match=r"engine\.kind = 'spark'"):
        micro("engine=spark")


def folders(cfg):
    from vlcp_dist import pipeline

    run = base.make_run(cfg, pipeline.stages(cfg))
    return {name: folder.path.name for name, folder in run.folders.items()}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("ipc=[1,2,3]", set()),
        ("engine.workers=5", set()),
        ("encode.batch_size=1", set()),
        ("prototypes.beta=0.3", {"prototypes", "synthesize", "evaluate"}),
        ("synthesize.strength=0.6", {"synthesize", "evaluate"}),
        ("evaluate.lr=0.5", {"baselines", "evaluate"}),
        ("evaluate.epochs=7", set()),
        ("evaluate.micro_batch_size=7", set()),
        ("finetune.micro_batch_size=3", set()),
        ("finetune.deepspeed=zero2_offload", set()),
        ("finetune.epochs=3", {"finetune", "synthesize", "evaluate"}),
    ],
)
def test_a_setting_renames_only_the_stages_that_depend_on_it(micro, override, changed):
    before, after = folders(micro()), folders(micro(override))
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_new_seed_or_source_renames_everything(micro):
    before = folders(micro())
    for override in ("seed=1", "data.test=0.3"):
        after = folders(micro(override))
        assert all(before[name] != after[name] for name in before)


def test_a_deepspeed_file_is_read_with_the_configuration(micro, tmp_path):
    assert json.loads((schema.DEEPSPEED / "zero1.json").read_text()) == micro().finetune.deepspeed
    assert micro("finetune.deepspeed=zero2").finetune.deepspeed["zero_optimization"]["stage"] == 2
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}')
    own = micro(f"finetune.deepspeed={tmp_path / 'own.json'}").finetune.deepspeed
    assert own == {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}


def test_a_listing_counts_by_its_content_not_its_place(micro, tmp_path):
    folders = []
    for place, text in (("a", "digit-0\tnull\n"), ("b", "digit-0\tnull\n"), ("c", "digit-0\tnil\n")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "classes.txt").write_text(text)
        cfg = micro(f"data.class_names={tmp_path / place / 'classes.txt'}")
        folders.append(base.make_run(cfg, pipeline.stages(cfg)).folders["evaluate"].path.name)
    assert folders[0] == folders[1] != folders[2]


def test_a_stage_gets_what_it_asks_for_itself_else_what_all_get(micro):
    engine = micro("engine.cpus_per_worker=2", "engine.stages={caption: {gpus_per_worker: 0.5, workers: 3}}").engine
    caption, encode = engine.placement("caption"), engine.placement("encode")
    assert (caption.cpus_per_worker, caption.gpus_per_worker, caption.workers) == (2, 0.5, 3)
    assert (encode.cpus_per_worker, encode.gpus_per_worker, encode.workers) == (2, None, None)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_say_what_they_are(path):
    text, cfg = path.read_text(), config.load(path)
    assert text.startswith("#")
    assert set(cfg.published) <= set(cfg.evaluate.nets)
    for by_ipc in cfg.published.values():
        assert set(by_ipc) <= set(cfg.ipc)


def test_each_protocol_has_its_nets_and_what_the_other_needs_renames_nothing(micro):
    soft = {"protocol": "soft", "image_size": 32, "epochs": 2}
    cfg = micro(f"evaluate={soft}")
    assert cfg.evaluate.nets == ["resnet18"] and schema.Evaluate().nets == ["resnetap10"]
    assert (schema.Evaluate(protocol="soft").image_size, schema.Evaluate().image_size) == (224, 256)
    before = folders(cfg)
    assert "teachers" in before and "teachers" not in folders(micro())
    taught = {"checkpoints": {"resnet18": "somewhere"}}
    assert folders(micro(f"evaluate={ {**soft, 'teacher': taught} }")) == before
    other = folders(micro(f"evaluate={ {**soft, 'teacher': {'epochs': 9}} }"))
    assert {name for name in before if before[name] != other[name]} == {"teachers", "baselines", "evaluate"}
    assert micro(f"evaluate={ {**soft, 'teacher': taught} }").evaluate.teacher.checkpoints["resnet18"].startswith("/")


def test_the_list_of_all_keys_is_what_its_script_writes():
    docs = Path(__file__).parents[1] / "docs"
    document = runpy.run_path(str(docs / "configuration.py"))["document"]()
    assert document == (docs / "configuration.md").read_text(), "python docs/configuration.py > docs/configuration.md"
    assert "| `finetune.learning_rate` |" in document and "| `engine.stages` |" in document
