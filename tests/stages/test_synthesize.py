"""Images follow from prototypes, prompts and settings, and metadata.jsonl says which."""

import io
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlcp_dist.models import diffusion
from vlcp_dist.stages import synthesize

IPC = 2
CLASSES = [f"digit-{digit}" for digit in range(10)]
STRATEGIES = ["L", "L+FK", "GGS", "DCS", "DCS-shuffled"]


def write_sentence(class_name: str, keywords: list[str]) -> str:
    """The sentence writer of a user."""
    return f"{class_name} with {len(keywords)} words, first {keywords[0]}"


WRITER = f"{__name__}:{write_sentence.__name__}"


def prototypes(run, class_id):
    """Centres (ipc, 4, h, w) and the table of a class."""
    path = run.folders["prototypes"].path / f"ipc={IPC}" / class_id
    return load_file(f"{path}.safetensors")["centers"], json.loads(Path(f"{path}.json").read_text())


def metadata(run, strategy, class_id):
    path = run.folders["synthesize"].path / strategy / f"ipc={IPC}" / class_id / "metadata.jsonl"
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
        return {name.removeprefix(f"{strategy}/ipc={IPC}/"): data for name, data in outcome.files.items()}

    return process


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_tree_is_an_image_folder(whole, strategy):
    root = whole.folders["synthesize"].path / strategy / f"ipc={IPC}"
    assert sorted(path.name for path in root.iterdir()) == CLASSES
    for class_id in CLASSES:
        files = sorted(path.name for path in (root / class_id).iterdir())
        assert files == ["0000.png", "0001.png", "metadata.jsonl"]
        for cluster, facts in enumerate(metadata(whole, strategy, class_id)):
            assert facts["file_name"] == f"{cluster:04d}.png"
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
    pipe = diffusion.load_pipeline(
        whole.diffusion_model, unet=whole.folders["finetune"].path / "unet", scheduler=cfg.scheduler
    )
    chosen = CLASSES[::3]
    facts = [line for class_id in chosen for line in metadata(whole, strategy, class_id)]
    expected = diffusion.synthesize(
        pipe,
        torch.cat([prototypes(whole, class_id)[0] for class_id in chosen]),
        [line["prompt"] for line in facts],
        seeds=[line["seed"] for line in facts],
        negative_prompt=cfg.negative_prompt,
        strength=cfg.strength,
        guidance_scale=cfg.guidance_scale,
        num_inference_steps=cfg.num_inference_steps,
    )
    root = whole.folders["synthesize"].path / strategy / f"ipc={IPC}"
    for line, image in zip(facts, expected, strict=True):
        assert np.abs(pixels(root / line["class_id"] / line["file_name"]) - image).max() <= 1


def test_strategies_give_different_images(whole):
    root = whole.folders["synthesize"].path
    for class_id in CLASSES:
        images = {(root / s / f"ipc={IPC}" / class_id / "0000.png").read_bytes() for s in STRATEGIES}
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
    before = whole.folders["synthesize"].path / "L" / f"ipc={IPC}"
    for name, data in files.items():
        if name.endswith(".png"):
            assert (data != (before / name).read_bytes()) == bool(changed)


def test_a_sentence_writer_of_the_users_own(whole, first_classes):
    files = first_classes("GGS", f"synthesize.sentence_writer={WRITER}")
    for class_id in CLASSES[:3]:
        _, table = prototypes(whole, class_id)
        lines = [json.loads(line) for line in files[f"{class_id}/metadata.jsonl"].splitlines()]
        for cluster, line in zip(table["clusters"], lines, strict=True):
            words = [word for word, _ in cluster["keywords"]]
            assert line["prompt"] == f"{table['class_name']} with {len(words)} words, first {words[0]}"
        before = whole.folders["synthesize"].path / "GGS" / f"ipc={IPC}" / class_id / "0000.png"
        assert files[f"{class_id}/0000.png"] != before.read_bytes()


@pytest.mark.parametrize("size", [24, 48])
def test_images_are_resized_to_the_size_asked_for(whole, first_classes, size):
    files = first_classes("DCS", f"synthesize.image_size={size}")
    before = whole.folders["synthesize"].path / "DCS" / f"ipc={IPC}"
    images = {name: data for name, data in files.items() if name.endswith(".png")}
    assert len(images) == 3 * IPC
    for name, data in images.items():
        expected = Image.open(before / name).resize((size, size), Image.Resampling.LANCZOS)
        assert np.abs(pixels(data) - np.asarray(expected)).max() <= 1
