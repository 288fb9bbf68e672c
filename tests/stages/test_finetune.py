"""Fine-tuning is what a plain loop of PyTorch gives, whether or not it was interrupted."""

import json
import math
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file
from transformers import CLIPTextModel, CLIPTokenizer

from vlcp_dist.stages import base, finetune
from vlcp_dist.stages.finetune import batches

SHAPE = (4, 2, 2)
FOUR_STEPS = ("finetune.epochs=1", "finetune.batch_size=32", "finetune.text_dropout=0.0")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def train(run):
    """Every file of a training by name, and what its marker would say."""
    worker = finetune.Worker(run)
    (unit,) = finetune.units(run)
    outcome = worker.process(unit, worker.read(unit))
    files = {name: x if isinstance(x, bytes) else x.read_bytes() for name, x in outcome.files.items()}
    return files, outcome.info


def samples(run):
    """Keys, latents (n, 4, h, w) and descriptions of the training images in the order of the index."""
    keys = [row.key for row in run.index.split("train")]
    latents, texts = run.latents(run.index.shards), run.descriptions(run.index.shards)
    return keys, torch.from_numpy(np.stack([latents[key] for key in keys])).float(), [texts[key] for key in keys]


def planned(run, n, shape):
    cfg = run.cfg.finetune
    return batches(
        n,
        shape=shape,
        epochs=cfg.epochs,
        batch_size=cfg.batch_size,
        text_dropout=cfg.text_dropout,
        seed=run.cfg.seed,
    )


def by_hand(run):
    """Averaged weights by name and the loss of every step: plain PyTorch on the same samples, noise and timesteps."""
    cfg, device, model = run.cfg.finetune, base.device(), run.diffusion_model
    unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet").to(device).train()
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").to(device)
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    _, latents, texts = samples(run)
    signal = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    averages = [p.detach().clone() for p in parameters]
    losses = []
    for step, batch in enumerate(planned(run, len(latents), latents.shape[1:])):
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * min(1, (step + 1) / max(1, cfg.warmup_steps))
        share = signal[batch.timesteps].view(-1, 1, 1, 1)
        noisy = share.sqrt() * latents[batch.rows] + (1 - share).sqrt() * batch.noise
        prompts = [texts[row] if keep else "" for row, keep in zip(batch.rows, batch.keep_text, strict=True)]
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            condition = text_encoder(tokens.input_ids.to(device))[0]
        predicted = unet(noisy.to(device), batch.timesteps.to(device), condition).sample
        loss = ((predicted - batch.noise.to(device)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        optimizer.step()
        decay = min(cfg.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, parameters, strict=True)]
        losses.append(loss.item())
    return {name: a.cpu() for (name, _), a in zip(unet.named_parameters(), averages, strict=True)}, losses


@pytest.mark.parametrize(
    "setting",
    [
        "ema_decay=0.9",
        "ema_decay=0.0",
        "text_dropout=0.6",
        "warmup_steps=8",
        "max_grad_norm=0.05",
        "weight_decay=2.0",
        "micro_batch_size=5",
    ],
)
def test_training_is_that_of_a_plain_loop(run_with, setting):
    run = run_with(*FOUR_STEPS, f"finetune.{setting}")
    files, info = train(run)
    weights, losses = by_hand(run)
    start = load_file(Path(run.diffusion_model) / WEIGHTS)
    history = json.loads(files["training.json"])
    assert info["steps"] == len(losses) == 4
    assert history["loss"] == pytest.approx(losses, rel=1e-5)
    exported = load(files[WEIGHTS])
    assert exported.keys() == weights.keys()
    # Not element by element: Adam makes a whole step of a gradient that is zero but for rounding.
    apart = sum((exported[name] - w).double().square().sum() for name, w in weights.items()) ** 0.5
    moved = sum((start[name] - w).double().square().sum() for name, w in weights.items()) ** 0.5
    assert apart < 1e-3 * moved


def test_history_holds_the_rates_of_the_warm_up(run_with):
    run = run_with(*FOUR_STEPS, "finetune.warmup_steps=2", "finetune.learning_rate=0.001")
    history = json.loads(train(run)[0]["training.json"])
    assert history["learning_rate"] == pytest.approx([0.0005, 0.001, 0.001, 0.001])


def test_an_interrupted_training_ends_with_the_same_bytes(run_with):
    settings = [*FOUR_STEPS, "finetune.batch_size=24", "finetune.warmup_steps=4", "finetune.text_dropout=0.3"]
    straight, _ = train(run_with(*settings, "finetune.checkpoint_every=100"))
    run = run_with(*settings, "finetune.checkpoint_every=2")
    checkpointed, first = train(run)  # five steps: the checkpoint of the fourth stays behind
    resumed, second = train(run)
    assert (first["resumed_at_step"], second["resumed_at_step"]) == (0, 4)
    assert straight == checkpointed
    assert straight.keys() == resumed.keys()
    assert json.loads(straight["training.json"]) == json.loads(resumed["training.json"])
    assert straight == resumed


def test_a_checkpoint_that_the_disk_garbles_is_an_error(run_with, monkeypatch):
    def garble(source: Path, target: Path) -> None:
        data = bytearray(Path(source).read_bytes())
        data[-1] ^= 1
        Path(target).write_bytes(data)

    run = run_with(*FOUR_STEPS, "finetune.learning_rate=0.002", "finetune.checkpoint_every=2")
    monkeypatch.setattr(shutil, "copyfile", garble)
    with pytest.raises(OSError, match=r"checkpoint.*read back other bytes"):
        train(run)
    assert not [path for path in run.folders["finetune"].path.iterdir() if "checkpoint" in path.name]


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_samples(run_with):
    run = run_with(*FOUR_STEPS, "finetune.learning_rate=1.0e+30")
    keys, latents, _ = samples(run)
    with pytest.raises(ValueError, match="loss is nan at step 2") as caught:
        train(run)
    second = list(planned(run, len(keys), latents.shape[1:]))[1]
    named = re.findall(r"digit-\d-\d{4}", str(caught.value))
    assert named and set(named) <= {keys[row] for row in second.rows}
    assert "finetune.learning_rate" in str(caught.value)


SIZES = [(1, 1), (5, 2), (7, 3), (9, 4), (16, 8), (13, 6), (33, 32), (5, 50)]


def listed(n, batch_size, **changes):
    settings = {"shape": SHAPE, "epochs": 3, "text_dropout": 0.3, "seed": 5}
    return list(batches(n, batch_size=batch_size, **(settings | changes)))


def counted(batch):
    return batch.rows if batch.weight else []


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_every_sample_comes_once_an_epoch(n, batch_size, world):
    ranks = [listed(n, batch_size, rank=rank, world=world) for rank in range(world)]
    steps = math.ceil(n / batch_size)
    assert {len(mine) for mine in ranks} == {3 * steps}
    for epoch in range(3):
        seen = [row for mine in ranks for batch in mine[epoch * steps : (epoch + 1) * steps] for row in counted(batch)]
        assert sorted(seen) == list(range(n))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("n", "batch_size"), SIZES)
def test_ranks_share_out_what_one_process_sees(n, batch_size, world):
    """Each sample keeps its noise, timestep and text, and the mean over ranks is the mean over the global batch."""
    value = torch.rand(n, generator=torch.Generator().manual_seed(0))
    parts = [listed(n, batch_size, rank=rank, world=world) for rank in range(world)]
    for alone, *shared in zip(listed(n, batch_size), *parts, strict=True):
        assert alone.weight == 1
        where = {row: i for i, row in enumerate(alone.rows)}
        for part in shared:
            assert part.rows  # every process takes part in every step
            places = [where[row] for row in part.rows]
            assert torch.equal(part.noise, alone.noise[places])
            assert torch.equal(part.timesteps, alone.timesteps[places])
            assert torch.equal(part.keep_text, alone.keep_text[places])
        mean = sum(part.weight * value[part.rows].mean() for part in shared) / world
        assert mean == pytest.approx(value[alone.rows].mean().item(), rel=1e-5)


@pytest.mark.parametrize("start", [1, 3, 4, 11])
def test_a_later_start_sees_the_same_batches(start):
    expected, later = listed(13, 4)[start:], listed(13, 4, start=start)
    assert [batch.rows for batch in later] == [batch.rows for batch in expected]
    for a, b in zip(later, expected, strict=True):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.timesteps, b.timesteps)
        assert torch.equal(a.keep_text, b.keep_text)


def test_order_and_noise_change_with_epoch_step_and_seed():
    steps = listed(64, 32)
    assert steps[0].rows != steps[2].rows != steps[4].rows
    assert len({batch.noise.numpy().tobytes() for batch in steps}) == len(steps)
    assert len({batch.timesteps.numpy().tobytes() for batch in steps}) == len(steps)
    other = listed(64, 32, seed=6)
    assert other[0].rows != steps[0].rows and not torch.equal(other[0].noise, steps[0].noise)


def test_noise_is_normal_timesteps_uniform_and_texts_are_dropped_by_their_share():
    steps = listed(1000, 500)
    noise = torch.cat([batch.noise for batch in steps])
    assert abs(noise.mean().item()) < 0.03 and abs(noise.std().item() - 1) < 0.03
    times = torch.cat([batch.timesteps for batch in steps]).float()
    assert 0 <= times.min() < 10 and 990 <= times.max() < 1000 and abs(times.mean().item() - 499.5) < 25
    kept = torch.cat([batch.keep_text for batch in steps]).float().mean().item()
    assert kept == pytest.approx(0.7, abs=0.04)
    assert all(batch.keep_text.all() for batch in listed(50, 8, text_dropout=0.0))
    assert not any(batch.keep_text.any() for batch in listed(50, 8, text_dropout=1.0))


def test_what_is_wrong_with_the_input_is_not_tried_again(run_with):
    """Ray Train starts all processes again after any error: a second start finds the reason and trains nothing."""
    run = run_with("finetune.epochs=3")
    stage = finetune.STAGE
    (unit,) = stage.units(run)
    folder = run.folders["finetune"]
    folder.path.mkdir(parents=True)
    (folder.path / finetune.FINAL_ERROR).write_text("{}")
    finetune._train_loop({"job": stage.job(run), "unit": unit})
    assert folder.marker(unit.name) is None
