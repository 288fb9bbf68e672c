"""Latents are the autoencoder's of the image as asked for, whatever the batches, and a bad image costs only itself."""

import io
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlcp_dist.data import shards
from vlcp_dist.data.manifest import Outcome
from vlcp_dist.stages import base, encode

SIZES = [(64, 40), (40, 64), (48, 48), (90, 32), (32, 32), (40, 50)]
BROKEN = "train-wide-broken"


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth and coloured, other at its sides than in the middle."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of images that are wide, tall and square, and one file that is no image."""
    root = tmp_path_factory.mktemp("odd") / "images"
    for split in ("train", "test"):
        for label, name in enumerate(("tall", "wide")):
            (root / split / name).mkdir(parents=True)
            for i, size in enumerate(SIZES):
                picture(*size, seed=10 * label + i).save(root / split / name / f"{i}.png")
    (root / "train" / "wide" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture
def outcomes(whole, run_with, folder, do):
    """outcomes(*overrides) -> what the worker makes of each shard, run: by the autoencoder of the finished run."""

    def encode_all(*overrides: str) -> tuple[list[Outcome], base.Run]:
        data = ["data.source=imagefolder", f"data.path={folder}", "data.test=null", "data.validation=0"]
        model = ["pretrain=null", f"diffusion.model={whole.diffusion_model}"]
        run = run_with(*data, *model, *overrides)
        if not run.folders["index"].path.exists():
            do(run, "index")
        worker = encode.Worker(run)
        return [worker.process(unit, worker.read(unit)) for unit in encode.units(run)], run

    return encode_all


@pytest.fixture
def encoded(outcomes, tmp_path):
    """encoded(*overrides) -> latents by key, failed keys, run."""

    def encode_all(*overrides: str) -> tuple[dict[str, np.ndarray], set[str], base.Run]:
        made, run = outcomes(*overrides)
        latents = {key: parts["npy"] for key, parts in arrays(made, tmp_path).items()}
        return latents, {failure.key for outcome in made for failure in outcome.failed}, run

    return encode_all


def arrays(made: list[Outcome], scratch: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of all tars: by key, then by extension."""
    found = {}
    for outcome in made:
        for data in outcome.files.values():
            (scratch / "shard.tar").write_bytes(data)
            for key, parts in shards.read(scratch / "shard.tar"):
                found[key] = {extension: shards.parse_npy(part) for extension, part in parts.items()}
    return found


def posterior_of(run: base.Run, pixels: np.ndarray):
    """The autoencoder's distribution of one image uint8 (h, w, 3), by diffusers alone, and its scaling factor."""
    model = Path(run.diffusion_model) / "vae"
    vae = diffusers.AutoencoderKL.from_pretrained(model)
    x = torch.tensor(pixels).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        return vae.encode(x).latent_dist, json.loads((model / "config.json").read_text())["scaling_factor"]


def squashed(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))


def centred(image: Image.Image) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return squashed(image.crop((left, top, left + side, top + side)))


@pytest.mark.parametrize(("resize", "expected"), [("squash", squashed), ("center", centred)])
def test_latents_are_scaled_means_of_the_posterior(encoded, folder, resize, expected):
    latents, failed, run = encoded(f"encode.resize={resize}", "encode.batch_size=4")
    assert failed == {BROKEN}
    good = [row for row in run.index.split("train") if row.key != BROKEN]
    assert list(latents) == [row.key for row in good]
    assert len(latents) == 2 * len(SIZES)
    for row in good:
        distribution, scale = posterior_of(run, expected(Image.open(folder / row.ref)))
        assert abs(scale - 1) > 0.05  # else a missing factor would not be seen
        z = latents[row.key]
        assert z.dtype == np.float16 and z.shape == (4, 8, 8)
        # Pillow resizes here, whose pixels may be another by one level in 255.
        np.testing.assert_allclose(z, distribution.mean[0] * scale, rtol=2e-3, atol=1e-2)


def test_a_sample_of_the_posterior_is_the_mean_and_noise_of_its_width(encoded, folder):
    latents, _, run = encoded("encode.posterior=sample")
    again, _, _ = encoded("encode.posterior=sample", "encode.batch_size=2")
    noise = []
    for row in run.index.split("train"):
        if row.key != BROKEN:
            distribution, scale = posterior_of(run, squashed(Image.open(folder / row.ref)))
            noise.append((latents[row.key] / scale - distribution.mean[0].numpy()) / distribution.std[0].numpy())
            np.testing.assert_allclose(again[row.key], latents[row.key], rtol=2e-3, atol=2e-3)
    assert abs(np.mean(noise)) < 0.1 and abs(np.std(noise) - 1) < 0.1
    assert len({part.tobytes() for part in noise}) == len(noise)


@pytest.mark.parametrize(
    "shortage",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ],
)
def test_latents_do_not_depend_on_batches_nor_on_the_memory_at_hand(encoded, monkeypatch, capsys, shortage):
    expected, _, _ = encoded("encode.batch_size=1")
    together, _, _ = encoded("encode.batch_size=32")
    whole_batch = diffusers.AutoencoderKL.encode

    def small_memory(self, x, *args, **kwargs):
        if len(x) > 2:
            raise shortage
        return whole_batch(self, x, *args, **kwargs)

    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", small_memory)
    halved, failed, _ = encoded("encode.batch_size=32")
    assert capsys.readouterr().err == "".join(
        f"encode: out of memory at batch {tried}, going on at {tried // 2}\n" for tried in (12, 6, 3)
    )
    assert failed == {BROKEN}
    for key, z in expected.items():
        np.testing.assert_allclose(together[key], z, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(halved[key], z, rtol=2e-3, atol=2e-3)
    assert list(together) == list(halved) == list(expected)


def test_memory_too_small_for_one_image_is_an_error(encoded, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        encoded()


def test_a_latent_that_is_not_finite_costs_its_own_image_only(encoded, folder, monkeypatch):
    expected, _, _ = encoded()
    sensitive = torch.tensor(squashed(Image.open(folder / "train" / "tall" / "3.png"))).permute(2, 0, 1)
    real = diffusers.AutoencoderKL.encode

    def overflowing(self, x, *args, **kwargs):
        bad = ((x.cpu() - (sensitive / 127.5 - 1)).abs() < 1e-3).flatten(1).all(1)
        result = real(self, x, *args, **kwargs)
        result.latent_dist.mean[bad] = torch.nan
        return result

    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", overflowing)
    latents, failed, _ = encoded()
    assert failed == {BROKEN, "train-tall-3"}
    assert list(latents) == [key for key in expected if key != "train-tall-3"]
    for key, z in latents.items():
        np.testing.assert_allclose(z, expected[key], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_the_mirrored_image_is_encoded_beside_it(outcomes, folder, tmp_path, posterior):
    made, run = outcomes("encode.horizontal_flip=true", "encode.batch_size=4", f"encode.posterior={posterior}")
    found = arrays(made, tmp_path)
    assert len(found) == 2 * len(SIZES)
    for row in run.index.split("train"):
        if row.key == BROKEN:
            continue
        for extension, pixels in (("npy", squashed), ("flip.npy", lambda image: squashed(image)[:, ::-1].copy())):
            distribution, scale = posterior_of(run, pixels(Image.open(folder / row.ref)))
            spread = 6 * distribution.std[0] * scale if posterior == "sample" else 0
            assert (
                (torch.tensor(found[row.key][extension]) - distribution.mean[0] * scale).abs() <= 1e-2 + spread
            ).all()
    if posterior == "sample":
        assert len({a.tobytes() for parts in found.values() for a in parts.values()}) == 2 * len(found)


def test_what_overflows_in_half_precision_is_computed_again_in_float32(outcomes, folder, whole, tmp_path):
    """The weights of the first layer are beyond float16; what follows normalises, so that in float32 all is well."""
    model = tmp_path / "model"
    shutil.copytree(whole.diffusion_model, model)
    weights = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.weight"] *= 1e6
    save_file(weights, model / "vae" / "diffusion_pytorch_model.safetensors")
    exact, _ = outcomes(f"diffusion.model={model}")
    made, _ = outcomes(f"diffusion.model={model}", "diffusion.dtype=float16", "encode.horizontal_flip=true")
    assert sum(outcome.info["redone_in_float32"] for outcome in made) == 2 * len(SIZES)
    assert [failure.key for outcome in made for failure in outcome.failed] == [BROKEN]
    expected = arrays(exact, tmp_path)
    for key, parts in arrays(made, tmp_path).items():
        assert parts.keys() == {"npy", "flip.npy"}
        np.testing.assert_allclose(parts["npy"], expected[key]["npy"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close(encoded, dtype):
    expected, _, _ = encoded()
    latents, _, _ = encoded(f"diffusion.dtype={dtype}")
    z, exact = (np.stack(list(each.values())).astype(np.float32) for each in (latents, expected))
    error = np.abs(z - exact).max() / exact.std()
    assert 0 < error < (0.01 if dtype == "float16" else 0.08)


def test_the_digits_of_the_run_are_encoded_too(whole):
    """The same reading on the files that the stage left: the digits are square, every shard is there."""
    latents = whole.latents(whole.index.shards)
    rows = list(whole.index.split("train"))
    assert list(latents) == [row.key for row in rows]
    for row in rows[::17]:
        image = Image.open(io.BytesIO(whole.source.read([row.ref])[0])).convert("RGB")
        distribution, scale = posterior_of(whole, squashed(image))
        np.testing.assert_allclose(latents[row.key], distribution.mean[0] * scale, rtol=2e-3, atol=2e-3)


def test_bytes_that_the_disk_garbles_fail_the_unit_and_leave_nothing(run_with, do, monkeypatch):
    run = run_with("diffusion.dtype=auto")  # a folder of latents that is still empty
    write = Path.write_bytes

    def garble(path: Path, data: bytes) -> int:
        return write(path, data[:-1] + bytes([data[-1] ^ 1]))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", garble)
        events = do(run, "encode")
    assert {event.kind for event in events} == {"failed"}
    assert all("read back other bytes" in event.message for event in events)
    assert not [path for path in run.folders["encode"].path.rglob("*") if path.is_file()]
    assert {event.kind for event in do(run, "encode")} == {"done"}
