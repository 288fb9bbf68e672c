"""Fine-tuning is what a plain loop of PyTorch gives, whether or not it was interrupted."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from vlcp_dist.data import checkpoints, shards
from vlcp_dist.engine import ray_train
from vlcp_dist.errors import InputError
from vlcp_dist.ops.order import batches
from vlcp_dist.stages import base, finetune

FOUR_STEPS = ("finetune.epochs=1", "finetune.batch_size=32", "finetune.text_dropout=0.0")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def train(run):
    """Every file of a training by name, and what its marker would say. What is for its way only is left behind."""
    worker = finetune.Worker(run)
    (unit,) = finetune.units(run)
    outcome = worker.process(unit, worker.read(unit))
    files = {name: x if isinstance(x, bytes) else x.read_bytes() for name, x in outcome.files.items()}
    return files, outcome.info


def clear(run):
    """The run with a folder of its own in which a training begins anew: knobs alone do not rename it."""
    folder = run.folders["finetune"]
    folder.path = folder.path.with_name(f"{folder.path.name}-anew")
    shutil.rmtree(folder.path, ignore_errors=True)
    return run


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
            condition = text_encoder(tokens.input_ids.to(device))[0].half().float()  # as they are kept
        predicted = unet(noisy.to(device), batch.timesteps.to(device), condition).sample
        ratio = (share / (1 - share)).flatten().to(device)
        weight = torch.ones_like(ratio) if cfg.snr_gamma is None else ratio.clamp(max=cfg.snr_gamma) / ratio
        loss = (((predicted - batch.noise.to(device)) ** 2).mean((1, 2, 3)) * weight).mean()
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
        "snr_gamma=5.0",
    ],
)
def test_training_is_that_of_a_plain_loop(run_with, setting):
    run = clear(run_with(*FOUR_STEPS, f"finetune.{setting}"))
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
    run = clear(run_with(*FOUR_STEPS, "finetune.warmup_steps=2", "finetune.learning_rate=0.001"))
    history = json.loads(train(run)[0]["training.json"])
    assert history["learning_rate"] == pytest.approx([0.0005, 0.001, 0.001, 0.001])


def test_an_interrupted_training_ends_with_the_same_bytes(run_with):
    settings = [*FOUR_STEPS, "finetune.batch_size=24", "finetune.warmup_steps=4", "finetune.text_dropout=0.3"]
    straight, _ = train(clear(run_with(*settings, "finetune.checkpoint_every=100")))
    run = clear(run_with(*settings, "finetune.checkpoint_every=2"))
    checkpointed, first = train(run)  # five steps: the checkpoint of the fourth stays behind
    assert {name[:19] for name in checkpoints.names(run.folders["finetune"].path)} == {
        "checkpoint-00000002",
        "checkpoint-00000004",
    }
    resumed, second = train(run)
    assert (first["resumed_at_step"], second["resumed_at_step"]) == (0, 4)
    assert straight.keys() == checkpointed.keys() == resumed.keys()
    assert straight == checkpointed
    assert json.loads(straight["training.json"]) == json.loads(resumed["training.json"])
    assert straight == resumed


def test_the_result_is_a_folder_that_diffusers_loads(run_with, whole, tmp_path):
    files, _ = train(clear(run_with(*FOUR_STEPS)))
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a seven", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3) and np.isfinite(image).all()
    assert pipe.scheduler.__class__.__name__ == "PNDMScheduler"
    place = str(Path(whole.diffusion_model).parent).encode()
    assert not [name for name, data in files.items() if place in data]  # nor of this machine's folders
    vae = Path(whole.diffusion_model) / "vae" / "diffusion_pytorch_model.safetensors"
    assert all(torch.equal(a, load_file(vae)[name]) for name, a in load(files[f"vae/{vae.name}"]).items())


def test_adapters_are_merged_into_the_result(run_with):
    run = clear(run_with(*FOUR_STEPS, "finetune.lora_rank=2", "finetune.learning_rate=0.01"))
    exported = load(train(run)[0][WEIGHTS])
    start = load_file(Path(run.diffusion_model) / WEIGHTS)
    assert exported.keys() == start.keys()
    changed = {name for name, value in start.items() if not torch.equal(exported[name], value)}
    assert changed and all(re.search(r"\.to_(q|k|v|out\.0)\.weight", name) for name in changed)
    change = exported[min(changed)] - start[min(changed)]
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 2


def test_cached_embeddings_and_token_ids_train_the_same(run_with):
    settings = [*FOUR_STEPS, "finetune.text_dropout=0.3"]
    embedded, first = train(clear(run_with(*settings)))
    tokens, second = train(clear(run_with(*settings, "finetune.text_cache_gib=0.0")))
    assert (first["text"], second["text"]) == ("embeddings", "tokens")
    assert json.loads(tokens["training.json"])["loss"] == pytest.approx(
        json.loads(embedded["training.json"])["loss"], rel=1e-5
    )


def test_samples_are_shown_after_every_epoch(run_with):
    run = clear(run_with("finetune.sample_images=3", "finetune.epochs=2"))
    train(run)
    folder = run.folders["finetune"].path
    assert sorted(str(path.relative_to(folder / "samples")) for path in folder.glob("samples/*/*.png")) == [
        f"epoch={epoch:03d}/{i}.png" for epoch in (1, 2) for i in range(3)
    ]
    prompts = json.loads((folder / "samples" / "prompts.json").read_text())
    keys, _, texts = samples(run)
    assert {p["key"]: p["description"] for p in prompts} == {
        keys[i]: texts[i] for i in (0, len(keys) // 3, 2 * len(keys) // 3)
    }
    assert list((folder / "tensorboard").glob("events*"))
    steps, rates, workers = zip(*json.loads((folder / "speed.json").read_text()), strict=True)
    assert list(steps) == sorted(steps) and min(rates) > 0 and set(workers) == {1}


def without(run, stage, victims):
    """The run with a copy of a stage's folder whose tars lack some samples."""
    source = run.folders[stage].path
    copy = source.with_name(f"{source.name}-damaged")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    for path in copy.glob("*.tar"):
        kept = [(key, parts) for key, parts in shards.read(path) if key not in victims]
        path.write_bytes(shards.pack(kept))
    run.folders[stage].path = copy
    return run


def test_missing_latents_and_descriptions_are_listed_and_fatal_above_the_limit(run_with):
    settings = [*FOUR_STEPS, "finetune.learning_rate=0.003"]
    keys, _, _ = samples(run_with())
    run = without(clear(run_with(*settings, "max_failed_samples=2")), "encode", {keys[3]})
    run = without(run, "caption", {keys[50]})
    worker, (unit,) = finetune.Worker(run), finetune.units(run)
    outcome = worker.process(unit, None)
    assert {(f.key, f.reason) for f in outcome.failed} == {(keys[3], "no latent"), (keys[50], "no description")}
    assert outcome.n_in == len(keys)
    run = without(clear(run_with(*settings, "max_failed_samples=1")), "encode", {keys[3], keys[7]})
    with pytest.raises(InputError, match=rf"2 of {len(keys)} .*max_failed_samples is 1(.|\n)*{keys[3]}.*no latent"):
        train(run)


def test_a_checkpoint_of_another_network_is_refused_with_both_shapes(run_with):
    run = clear(run_with(*FOUR_STEPS, "finetune.batch_size=24", "finetune.checkpoint_every=2"))
    train(run)
    folder = run.folders["finetune"].path
    path = folder / "checkpoint-00000004.weights.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] = torch.zeros(7, 4, 3, 3)
    save_file(weights, path)
    metadata = folder / "checkpoint-00000004.json"
    record = json.loads(metadata.read_text())
    record["files"][path.name]["bytes"] = path.stat().st_size
    metadata.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"conv_in\.weight is \[7, 4, 3, 3\] in it and \[16, 4, 3, 3\] in this model"):
        train(run)


def test_a_checkpoint_that_the_disk_garbles_is_an_error(run_with, monkeypatch):
    def garble(source: Path, target: Path) -> None:
        data = bytearray(Path(source).read_bytes())
        data[-1] ^= 1
        Path(target).write_bytes(data)

    run = clear(run_with(*FOUR_STEPS, "finetune.learning_rate=0.002", "finetune.checkpoint_every=2"))
    train(run)
    for name in checkpoints.names(run.folders["finetune"].path):
        (run.folders["finetune"].path / name).unlink()
    monkeypatch.setattr(shutil, "copyfile", garble)
    with pytest.raises(OSError, match=r"checkpoint.*read back other bytes"):
        train(run)
    assert checkpoints.newest(run.folders["finetune"].path) is None


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_samples_and_keeps_the_last_checkpoint(run_with):
    settings = [*FOUR_STEPS, "finetune.learning_rate=1.0e+30", "finetune.warmup_steps=3", "finetune.checkpoint_every=1"]
    run = clear(run_with(*settings))
    keys, latents, _ = samples(run)
    with pytest.raises(ValueError, match=r"at step (\d)") as caught:
        train(run)
    step = int(re.search(r"at step (\d)", str(caught.value))[1])
    batch = list(planned(run, len(keys), latents.shape[1:]))[step - 1]
    named = re.findall(r"digit-\d-\d{4}", str(caught.value))
    assert named and set(named) <= {keys[row] for row in batch.rows}
    assert "finetune.learning_rate" in str(caught.value)
    kept = checkpoints.newest(run.folders["finetune"].path)
    assert (kept["step"] if kept else 0) == step - 1


def test_what_is_wrong_with_the_input_is_not_tried_again(run_with):
    """Ray Train starts all processes again after any error: a second start finds the reason and trains nothing."""
    run = clear(run_with("finetune.epochs=3"))
    stage = finetune.STAGE
    (unit,) = stage.units(run)
    folder = run.folders["finetune"]
    folder.path.mkdir(parents=True)
    (folder.path / ray_train.FINAL_ERROR).write_text("{}")
    ray_train._train_loop({"job": stage.job(run), "unit": unit})
    assert folder.marker(unit.name) is None
