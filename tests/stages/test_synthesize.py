"""Images follow from prototypes, prompts and settings, and metadata.jsonl says which."""

import io
import json
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlcp_dist.errors import InputError
from vlcp_dist.models import synthesis
from vlcp_dist.models.writer import SentenceWriter
from vlcp_dist.stages import synthesize

IPC = 2
CLASSES = [f"digit-{digit}" for digit in range(10)]
STRATEGIES = ["L", "L+FK", "GGS", "DCS", "DCS-shuffled"]


def prototypes(run, class_id):
    """Centres (ipc, 4, h, w) and the table of a class."""
    path = run.folders["prototypes"].path / f"ipc={IPC}" / class_id
    return load_file(f"{path}.safetensors")["centers"], json.loads(Path(f"{path}.json").read_text())


def metadata(run, strategy, class_id):
    path = run.folders["synthesize"].path / strategy / f"ipc={IPC}" / "train" / class_id / "metadata.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)).astype(int)


@pytest.fixture(scope="module")
def first_classes(run_with):
    """first_classes(strategy, *overrides) -> the files of the strategy's first unit, by name within the strategy."""

    def process(strategy, *overrides):
        run = run_with(f"synthesize.strategies=[{strategy}]", *overrides)
        worker, unit = synthesize.Worker(run), synthesize.units(run)[0]
        outcome = worker.process(unit, worker.read(unit))
        return {name.removeprefix(f"{strategy}/ipc={IPC}/train/"): data for name, data in outcome.files.items()}

    return process


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Folder of a tiny Llama, untrained, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_tree_is_an_image_folder(whole, strategy):
    root = whole.folders["synthesize"].path / strategy / f"ipc={IPC}" / "train"
    assert sorted(path.name for path in root.iterdir()) == CLASSES
    for class_id in CLASSES:
        files = sorted(path.name for path in (root / class_id).iterdir())
        assert files == ["0000-0.png", "0001-0.png", "metadata.jsonl"]
        for cluster, facts in enumerate(metadata(whole, strategy, class_id)):
            assert facts["file_name"] == f"{cluster:04d}-0.png"
            assert (facts["class_id"], facts["cluster"], facts["strategy"]) == (class_id, cluster, strategy)
            with Image.open(root / class_id / facts["file_name"]) as image:
                image.load()
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))


def test_prompts_are_those_of_the_strategies(whole):
    other = {class_id: {f["text_class"] for f in metadata(whole, "DCS-shuffled", class_id)} for class_id in CLASSES}
    assert all(len(texts) == 1 for texts in other.values())
    givers = {class_id: texts.pop() for class_id, texts in other.items()}
    assert sorted(givers.values()) == CLASSES  # every class gives its texts to exactly one
    assert all(class_id != giver for class_id, giver in givers.items())
    for class_id in CLASSES:
        _, table = prototypes(whole, class_id)
        _, giver = prototypes(whole, givers[class_id])
        for c, cluster in enumerate(table["clusters"]):
            prompts = {strategy: metadata(whole, strategy, class_id)[c]["prompt"] for strategy in STRATEGIES}
            words = [word for word, _ in cluster["keywords"]]
            assert len(words) >= 3 and cluster["description"]
            assert prompts["L"] == table["class_name"]
            assert prompts["L+FK"] == ", ".join([table["class_name"], *words])
            assert table["class_name"] in prompts["GGS"] and words[0] in prompts["GGS"]
            assert prompts["DCS"] == cluster["description"]
            assert table["class_name"] in prompts["DCS"]
            assert prompts["DCS-shuffled"] == giver["clusters"][c]["description"]
            assert table["class_name"] not in prompts["DCS-shuffled"]
            dcs = metadata(whole, "DCS", class_id)[c]
            assert (dcs["text_class"], dcs["description_key"]) == (class_id, cluster["key"])


def test_noise_is_one_for_all_strategies_and_another_for_every_image(whole):
    seeds = {
        strategy: [facts["seed"] for class_id in CLASSES for facts in metadata(whole, strategy, class_id)]
        for strategy in STRATEGIES
    }
    assert all(of_strategy == seeds["DCS"] for of_strategy in seeds.values())
    assert len(set(seeds["DCS"])) == IPC * len(CLASSES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_images_are_made_of_the_prompts_and_seeds_that_the_metadata_tell(whole, strategy):
    cfg = whole.cfg.synthesize
    pipe = synthesis.load_pipeline(
        whole.diffusion_model, unet=whole.folders["finetune"].path / "unet", scheduler=cfg.scheduler
    )
    chosen = CLASSES[::3]
    facts = [line for class_id in chosen for line in metadata(whole, strategy, class_id)]
    synthesizer = synthesis.Synthesizer(
        pipe,
        negative_prompt=cfg.negative_prompt,
        strength=cfg.strength,
        guidance_scale=cfg.guidance_scale,
        num_inference_steps=cfg.num_inference_steps,
    )
    latents = torch.cat([prototypes(whole, class_id)[0] for class_id in chosen])
    expected = {}
    for positions, batch in synthesizer.draw(latents, [f["prompt"] for f in facts], [f["seed"] for f in facts]):
        expected |= dict(zip(positions, batch, strict=True))
    root = whole.folders["synthesize"].path / strategy / f"ipc={IPC}" / "train"
    for position, line in enumerate(facts):
        assert np.abs(pixels(root / line["class_id"] / line["file_name"]) - expected[position]).max() <= 1


def test_strategies_give_different_images(whole):
    root = whole.folders["synthesize"].path
    for class_id in CLASSES:
        images = {(root / s / f"ipc={IPC}" / "train" / class_id / "0000-0.png").read_bytes() for s in STRATEGIES}
        assert len(images) == len(STRATEGIES)


SETTINGS = {
    "none": {},
    "strength": {"strength": 0.75},
    "guidance": {"guidance_scale": 3.0},
    "steps": {"num_inference_steps": 8},
    "negative prompt": {"negative_prompt": "sturdy bold digit seven"},
    "scheduler": {"scheduler": "ddim"},
}


@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_reaches_the_images_and_is_told(whole, first_classes, changed):
    """Against diffusers' own pipeline, called as its documentation says."""
    files = first_classes("L", *(f"synthesize.{name}={value}" for name, value in changed.items()))
    settings = {"scheduler": "pndm", "strength": 0.5, "guidance_scale": 8.0, "num_inference_steps": 4}
    settings |= {"negative_prompt": "cartoon, anime, painting"} | changed
    scheduler = settings.pop("scheduler")
    unet = diffusers.UNet2DConditionModel.from_pretrained(whole.folders["finetune"].path / "unet")
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
        whole.diffusion_model, unet=unet, safety_checker=None, feature_extractor=None
    )
    if scheduler == "ddim":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    for line in map(json.loads, files["digit-1/metadata.jsonl"].splitlines()):
        assert settings.items() <= line.items()
        image = pipe(
            prompt=line["class_name"],
            image=prototypes(whole, "digit-1")[0][[line["cluster"]]],
            generator=torch.Generator().manual_seed(line["seed"]),
            output_type="np",
            **settings,
        ).images[0]
        assert np.abs(pixels(files[f"digit-1/{line['file_name']}"]) - 255 * image).max() <= 1.5
    before = whole.folders["synthesize"].path / "L" / f"ipc={IPC}" / "train"
    for name, data in files.items():
        if name.endswith(".png"):
            assert (data != (before / name).read_bytes()) == bool(changed)


def test_sentences_of_a_language_model(whole, first_classes, language_model):
    files = first_classes("GGS", f"synthesize.sentence_model={language_model}")
    writer = SentenceWriter(str(language_model), revision=None, device="cpu", dtype=torch.float32)
    for class_id in CLASSES[:3]:
        _, table = prototypes(whole, class_id)
        lines = [json.loads(line) for line in files[f"{class_id}/metadata.jsonl"].splitlines()]
        for cluster, line in zip(table["clusters"], lines, strict=True):  # one at a time: padding changes nothing
            assert line["prompt"] == writer.write([(table["class_name"], [w for w, _ in cluster["keywords"]])])[0]
        before = whole.folders["synthesize"].path / "GGS" / f"ipc={IPC}" / "train" / class_id / "0000-0.png"
        assert files[f"{class_id}/0000-0.png"] != before.read_bytes()


def test_a_missing_language_model_is_told_before_anything_starts(run_with, tmp_path):
    cfg = run_with(f"synthesize.sentence_model={tmp_path / 'absent'}").cfg
    with pytest.raises(InputError, match=r"synthesize\.sentence_model: cannot load .*absent(.|\n)*hf download"):
        synthesize.STAGE.check(cfg)


def test_repeats_of_a_prototype_differ_by_their_noise(whole, first_classes):
    files = first_classes("DCS", "synthesize.images_per_prototype=3")
    before = whole.folders["synthesize"].path / "DCS" / f"ipc={IPC}" / "train" / "digit-0"
    lines = [json.loads(line) for line in files["digit-0/metadata.jsonl"].splitlines()]
    assert [line["file_name"] for line in lines] == [f"{c:04d}-{r}.png" for c in range(IPC) for r in range(3)]
    assert len({files[f"digit-0/{line['file_name']}"] for line in lines}) == len(lines)
    for c in range(IPC):  # the first is the one that there was
        name = f"{c:04d}-0.png"
        assert np.abs(pixels(files[f"digit-0/{name}"]) - pixels(before / name)).max() <= 1


def test_the_datasets_library_loads_the_folder(whole, tmp_path):
    root = whole.folders["synthesize"].path / "DCS" / f"ipc={IPC}"
    facts = {(f["class_id"], f["file_name"]): f for class_id in CLASSES for f in metadata(whole, "DCS", class_id)}
    images = datasets.load_dataset("imagefolder", data_dir=str(root / "train"), split="train", cache_dir=str(tmp_path))
    assert len(images) == len(facts)
    for item in images:
        path = root / "train" / item["class_id"] / f"{item['cluster']:04d}-{item['repeat']}.png"
        assert item["prompt"] == facts[item["class_id"], path.name]["prompt"]
        assert np.array_equal(np.asarray(item["image"]), pixels(path))
    tars = datasets.load_dataset(
        "webdataset", data_files=str(root / "webdataset" / "*.tar"), split="train", cache_dir=str(tmp_path)
    )
    assert [item["cls"] for item in tars] == [facts[key]["label"] for key in sorted(facts)]
    for item, key in zip(tars, sorted(facts), strict=True):
        assert item["json"] == facts[key]
        assert np.array_equal(np.asarray(item["png"]), pixels(root / "train" / Path(*key)))
    by_card = datasets.load_dataset(str(root), split="train", cache_dir=str(tmp_path))
    assert sorted(by_card["seed"]) == sorted(fact["seed"] for fact in facts.values())


def test_the_card_tells_how_the_set_was_made(whole):
    text = (whole.folders["synthesize"].path / "L" / f"ipc={IPC}" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["size_categories"] == ["n<1K"] and "dataset-distillation" in front["tags"]
    assert (
        f"{IPC * 10} images in place of 120" in text
        and "from a text: the class name" in text
        and "(strategy L)" in text
    )
    assert "| strength | 0.5 |" in text and "| 7 | digit-7 |" in text


@pytest.mark.parametrize("size", [24, 48])
def test_images_are_resized_to_the_size_asked_for(whole, first_classes, size):
    files = first_classes("DCS", f"synthesize.image_size={size}")
    before = whole.folders["synthesize"].path / "DCS" / f"ipc={IPC}" / "train"
    images = {name: data for name, data in files.items() if name.endswith(".png")}
    assert len(images) == 3 * IPC
    for name, data in images.items():
        expected = Image.open(before / name).resize((size, size), Image.Resampling.LANCZOS)
        assert np.abs(pixels(data) - np.asarray(expected)).max() <= 1
