"""The tiny Stable Diffusion: diffusers loads it, it is reproducible, and its parts learned something."""

import hashlib
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from vlcp_dist.models.tiny_sd import build_tiny_sd, train_tokenizer


def bars(n: int) -> tuple[np.ndarray, list[str]]:
    """Images (n, 3, 16, 16) with a bright bar, and texts that say how it lies."""
    images = np.zeros((n, 3, 16, 16), np.uint8)
    texts = []
    for i in range(n):
        across = i % 2 == 0
        at = 2 + i % 11
        images[i][(slice(None), slice(at, at + 3)) if across else (slice(None), slice(None), slice(at, at + 3))] = 230
        texts.append(f"a bar lying {'across' if across else 'upright'} at {at}")
    return images, texts


def build(folder: Path, **options: object) -> dict[str, float]:
    images, texts = bars(48)
    sizes = {"vae_steps": 4, "contrastive_steps": 3, "vae_channels": (8, 8, 8), "unet_channels": (8, 16)}
    return build_tiny_sd(folder, images, texts, **(sizes | {"num_threads": 1} | options))  # type: ignore[arg-type]


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    build(path)
    return path


def test_diffusers_loads_it_without_warnings_and_draws(folder, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        from diffusers import StableDiffusionPipeline

        caplog.clear()
        pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a bar lying across", num_inference_steps=2, height=16, width=16, output_type="np").images
    assert not caplog.records
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()
    assert not list(folder.rglob("*.bin"))


def test_scheduler_is_that_of_sd15(folder):
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "PNDMScheduler"
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert (config["steps_offset"], config["skip_prk_steps"], config["set_alpha_to_one"]) == (1, True, False)


def test_same_arguments_same_bytes_and_the_callers_generator_is_untouched(folder, tmp_path):
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    threads = torch.get_num_threads()
    build(tmp_path / "again")
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads
    assert digest(tmp_path / "again") == digest(folder)
    build(tmp_path / "other", seed=1)
    assert (
        digest(tmp_path / "other")["unet/diffusion_pytorch_model.safetensors"]
        != (digest(folder)["unet/diffusion_pytorch_model.safetensors"])
    )


def test_scaled_latents_have_unit_deviation(folder):
    from vlcp_dist.models.diffusion import encode_images, load_vae

    images, _ = bars(48)
    latents = encode_images(load_vae(folder), torch.from_numpy(images).float() / 127.5 - 1)
    assert latents.shape == (48, 4, 4, 4)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)


def test_training_improves_the_autoencoder_and_the_text_encoder(folder, tmp_path):
    phases = []
    trained = build(
        tmp_path / "m", vae_steps=60, contrastive_steps=60, progress=lambda phase, *rest: phases.append((phase, *rest))
    )
    untrained = build(tmp_path / "n", vae_steps=0, contrastive_steps=1)
    assert trained["vae_psnr"] > untrained["vae_psnr"] + 3
    assert trained["text_accuracy"] > untrained["text_accuracy"] + 0.3
    assert [(p, s, n) for p, s, n, _ in phases if s == n] == [("vae", 60, 60), ("text", 60, 60)]


def test_tokenizer_merges_known_words_and_encodes_any_text(tmp_path):
    tokenizer = train_tokenizer(["a narrow digit"] * 5, vocab_size=600)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tokenizer).from_pretrained(tmp_path)
    assert tokenizer.tokenize("A narrow DIGIT") == ["a</w>", "narrow</w>", "digit</w>"]
    ids = tokenizer("größer ☃!", truncation=True, padding="max_length").input_ids
    assert len(ids) == tokenizer.model_max_length == 77
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("größer ☃")
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


def test_tokenizer_breaks_ties_the_same_way_every_time():
    _, texts = bars(48)
    trained = {train_tokenizer(texts, vocab_size=1000).backend_tokenizer.to_str() for _ in range(30)}
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (np.zeros((20, 3, 16, 16), np.float32), ["x"] * 20, "uint8"),
        (np.zeros((20, 16, 16, 3), np.uint8), ["x"] * 20, r"\(20, 16, 16, 3\)"),
        (np.zeros((20, 3, 18, 18), np.uint8), ["x"] * 20, "multiple of 4"),
        (np.zeros((3, 3, 16, 16), np.uint8), ["x"] * 3, "at least 16"),
        (np.zeros((20, 3, 16, 16), np.uint8), ["x"] * 19, "as many texts, not 19"),
    ],
)
def test_wrong_input_is_named(tmp_path, images, texts, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_sd(tmp_path, images, texts)
