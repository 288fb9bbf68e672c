"""Encoding, prompts and synthesis with a tiny Stable Diffusion; missing weights; seeds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vlcp_dist.models.diffusion import (
    encode_images,
    encode_prompts,
    image_seed,
    load_pipeline,
    load_vae,
    synthesize,
)
from vlcp_dist.models.tiny_sd import build_tiny_sd

LONG = "wide " * 100 + "narrow"
OPTIONS = {"negative_prompt": "dark", "num_inference_steps": 4, "strength": 0.5, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 16, 16), dtype=np.uint8)
    texts = [f"a {'wide' if i % 2 else 'narrow'} digit, number {i}" for i in range(32)]
    sizes = {"vae_channels": (8, 8, 8), "unet_channels": (8, 16), "num_threads": 1}
    build_tiny_sd(path, images, texts, vae_steps=4, contrastive_steps=3, **sizes)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a wide digit", "a narrow digit", LONG, "a", "", "a digit", LONG + " thin", "number"]


def draw(pipe, latents, prompts, seeds, **options):
    return synthesize(pipe, latents, prompts, seeds=seeds, **(OPTIONS | options))


def test_an_image_depends_on_its_own_latent_prompt_and_seed_alone(pipe, latents):
    together = draw(pipe, latents, PROMPTS, list(range(8)), batch_size=8)
    assert together.shape == (8, 16, 16, 3) and together.dtype == np.uint8
    alone = draw(pipe, latents, PROMPTS, list(range(8)), batch_size=1)
    assert np.abs(together.astype(int) - alone).max() <= 1
    order = [6, 0, 3]
    some = draw(pipe, latents[order], [PROMPTS[i] for i in order], order, batch_size=2)
    assert np.abs(together[order].astype(int) - some).max() <= 1
    assert np.array_equal(together, draw(pipe, latents, PROMPTS, list(range(8)), batch_size=8))


@pytest.mark.parametrize("scheduler", ["pndm", "ddim"])
def test_latent_prompt_and_seed_all_matter(folder, latents, scheduler):
    pipe = load_pipeline(folder, scheduler=scheduler)
    base = draw(pipe, latents[:1], ["a wide digit"], [1])
    assert not np.array_equal(base, draw(pipe, latents[1:2], ["a wide digit"], [1]))
    assert not np.array_equal(base, draw(pipe, latents[:1], ["a narrow digit"], [1], guidance_scale=50.0))
    assert not np.array_equal(base, draw(pipe, latents[:1], ["a wide digit"], [2]))


def test_little_noise_gives_back_the_prototype(folder):
    """Latents reach the noise unscaled: with almost no noise the image is the decoded latent."""
    pipe, vae = load_pipeline(folder, scheduler="ddim"), load_vae(folder)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    z = encode_images(vae, images)
    decoded = ((vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    steps = {"num_inference_steps": 1000, "strength": 0.001, "guidance_scale": 1.0}
    drawn = draw(pipe, z, ["", ""], [0, 1], **steps)
    assert np.abs(drawn - decoded.numpy()).mean() < 8


def test_memory_shortage_halves_the_batch_and_is_told(pipe, latents, monkeypatch, capsys):
    expected = draw(pipe, latents, PROMPTS, list(range(8)), batch_size=8)
    forward = pipe.unet.forward

    def small_memory(sample, *args, **kwargs):
        if len(sample) > 2 * 2:  # guidance doubles the batch
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", small_memory)
    drawn = draw(pipe, latents, PROMPTS, list(range(8)), batch_size=8)
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("memory ")[2] for line in said] == ["at batch 6, going on at 3", "at batch 3, going on at 1"]


def test_memory_shortage_at_one_image_is_an_error(pipe, latents, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe.unet, "forward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipe, latents, PROMPTS, list(range(8)))


def test_long_prompts_are_encoded_in_windows(pipe):
    width = pipe.text_encoder.config.hidden_size
    positive, negative = encode_prompts(pipe, ["a digit", LONG, LONG + " thin"], "dark")
    assert [tuple(e.shape) for e in positive] == [(77, width), (154, width), (154, width)]
    assert [e.shape for e in negative] == [e.shape for e in positive]
    assert torch.equal(positive[1][:77], positive[2][:77])
    assert not torch.allclose(positive[1][77:], positive[2][77:], atol=1e-3)


def test_a_prompts_embedding_is_the_pipelines_own_when_it_fits(pipe):
    positive, negative = encode_prompts(pipe, ["a wide digit", LONG], "dark")
    own, own_negative = pipe.encode_prompt("a wide digit", "cpu", 1, True, "dark")
    assert torch.allclose(positive[0], own[0], atol=1e-5)
    assert torch.allclose(negative[0], own_negative[0], atol=1e-5)
    assert torch.allclose(negative[1][:77], own_negative[0], atol=1e-5)


def test_a_long_negative_prompt_lengthens_the_prompt(pipe):
    positive, negative = encode_prompts(pipe, ["a digit"], LONG)
    assert len(positive[0]) == len(negative[0]) == 154
    empty, _ = encode_prompts(pipe, [""], "")
    assert torch.allclose(positive[0][77:], empty[0], atol=1e-5)


def test_encoding_takes_the_mean_unless_given_generators(folder):
    vae = load_vae(folder)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = encode_images(vae, images)
    expected = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    assert mean.dtype == torch.float32 and torch.allclose(mean, expected, atol=1e-5)
    levels = ((images + 1) * 127.5).round().byte()
    assert torch.allclose(encode_images(vae, levels), encode_images(vae, levels.float() / 127.5 - 1), atol=1e-5)

    def sampled(part, seeds):
        return encode_images(vae, part, sample_generators=[torch.Generator().manual_seed(s) for s in seeds])

    assert not torch.allclose(sampled(images, [0, 1, 2]), mean, atol=1e-4)
    assert torch.allclose(sampled(images, [0, 1, 2])[1:2], sampled(images[1:2], [1]), atol=1e-5)
    with pytest.raises(ValueError, match=r"3 images need as many generators, not 1"):
        sampled(images, [0])


def test_not_finite_latents_are_refused(pipe, latents):
    broken = latents.clone()
    broken[5] = float("inf")
    with pytest.raises(FloatingPointError, match=r"prototypes .* positions \[5\]"):
        draw(pipe, broken, PROMPTS, list(range(8)))


def test_wrong_arguments_of_synthesize_are_named(pipe, latents):
    with pytest.raises(ValueError, match=r"8 latents, 7 prompts and 8 seeds"):
        draw(pipe, latents, PROMPTS[:7], list(range(8)))
    with pytest.raises(ValueError, match=r"strength 0.1 of 4 inference steps leaves no step"):
        draw(pipe, latents, PROMPTS, list(range(8)), strength=0.1)


def test_fine_tuned_unet_replaces_the_models_own(folder, pipe, latents, tmp_path):
    unet = load_pipeline(folder).unet
    with torch.no_grad():
        unet.conv_out.weight.mul_(-1)
    unet.save_pretrained(tmp_path / "unet")
    tuned = load_pipeline(folder, unet=tmp_path / "unet")
    assert torch.equal(tuned.unet.conv_out.weight, unet.conv_out.weight)
    assert not np.array_equal(draw(tuned, latents[:1], ["a"], [0]), draw(pipe, latents[:1], ["a"], [0]))
    with pytest.raises(FileNotFoundError, match="no fine-tuned U-Net"):
        load_pipeline(folder, unet=tmp_path / "nowhere")


def test_missing_weights_name_the_download_command(tmp_path, folder, monkeypatch):
    for load in (load_vae, load_pipeline):
        with pytest.raises(FileNotFoundError) as error:
            load(tmp_path / "none", revision="abc")
        command = str(error.value).splitlines()[-1].strip()
        assert command.startswith("hf download stable-diffusion-v1-5/stable-diffusion-v1-5 model_index.json")
        assert command.endswith(f"--revision abc --local-dir {tmp_path / 'none'}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"hf download nobody/nothing model_index\.json"):
        load_pipeline("nobody/nothing")


def test_pickled_weights_are_not_loaded(folder, tmp_path):
    vae = load_vae(folder)
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_vae(tmp_path)


def test_unknown_scheduler_is_named(folder):
    with pytest.raises(ValueError, match="pndm, ddim, not 'euler'"):
        load_pipeline(folder, scheduler="euler")  # type: ignore[arg-type]


def test_image_seed_is_stable_and_distinct():
    assert image_seed(0, "n01440764", 3, 0) == 9001863866880408477
    keys = [(run, c, k, r) for run in (0, 1) for c in ("a", "b") for k in range(20) for r in range(3)]
    seeds = [image_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert image_seed(1, "1", 11, 1) != image_seed(1, "11", 1, 1)
