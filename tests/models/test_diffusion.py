"""The autoencoder of a tiny Stable Diffusion; weights that are missing or pickled; seeds."""

import pytest
import torch

from vlcp_dist.models.diffusion import encode_images, image_seed, load_vae


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


def test_pickled_weights_are_not_loaded(folder, tmp_path):
    vae = load_vae(folder)
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_vae(tmp_path)


def test_image_seed_is_stable_and_distinct():
    assert image_seed(0, "n01440764", 3, 0) == 9001863866880408477
    keys = [(run, c, k, r) for run in (0, 1) for c in ("a", "b") for k in range(20) for r in range(3)]
    seeds = [image_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert image_seed(1, "1", 11, 1) != image_seed(1, "11", 1, 1)
