"""Captioners through the real path: a tiny LLaVA from disk, and the measured one."""

import hashlib
import json
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image

from vlcp_dist import config
from vlcp_dist.models.captioner import Caption, GumbelNoise, load_captioner
from vlcp_dist.models.tiny_llava import build_tiny_llava

NAMES = ["dog", "Saluki, gazelle hound", "ship", "cat", "golf ball", "frog", "French horn", "digit {three}"]
DEFAULTS = {
    "revision": None,
    "prompt": config.PROMPT,
    "max_new_tokens": 16,
    "temperature": 0.0,
    "batch_size": 8,
    "device": "cpu",
    "dtype": "float32",
    "seed": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    build_tiny_llava(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (40, 60), (90, 50), (32, 33), (64, 64), (31, 32), (20, 20), (50, 50)]
    return [
        Image.fromarray(
            np.kron(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8), np.ones((h // 2, w // 2, 1), np.uint8))
        )
        for h, w in sizes
    ]


def llava(folder, **changed):
    return load_captioner("llava", **{"model": str(folder), **DEFAULTS, **changed})


def test_a_batch_equals_single_runs(folder, images):
    captioner = llava(folder)
    batch = captioner.describe(images, NAMES)
    single = [captioner.describe([image], [name])[0] for image, name in zip(images, NAMES, strict=True)]
    assert batch == single
    # Otherwise equality would say nothing: the answers must depend on the image and on the name.
    assert len({caption.text for caption in batch}) >= 6
    swapped = captioner.describe(images, NAMES[1:] + NAMES[:1])
    assert [c.text for c in swapped] != [c.text for c in batch]
    assert captioner.describe([], []) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(folder, images, batch_size):
    assert llava(folder, batch_size=batch_size).describe(images, NAMES) == llava(folder).describe(images, NAMES)


def test_the_prompt_is_the_papers(folder, images):
    captioner = llava(folder)
    assert config.PROMPT == (
        "Describe the physical appearance of the {class_name} in the image. "
        "Include details about its shape, posture, color, and any distinct features."
    )
    inputs = captioner.build_inputs(images, NAMES)
    for name, ids, mask in zip(NAMES, inputs["input_ids"], inputs["attention_mask"], strict=True):
        text = captioner.processor.tokenizer.decode(ids[mask.bool()])
        assert text == (
            "<s>USER: " + "<image>" * 16 + f"\nDescribe the physical appearance of the {name} in the image. "
            "Include details about its shape, posture, color, and any distinct features. ASSISTANT:"
        )
        # Left padding: once the text has begun it does not stop.
        assert mask.tolist() == sorted(mask.tolist())


def test_without_a_chat_template_the_prompt_takes_llavas_form(folder, images):
    captioner = llava(folder)
    with_template = captioner.build_inputs(images, NAMES)["input_ids"]
    captioner.processor.chat_template = None
    assert torch.equal(captioner.build_inputs(images, NAMES)["input_ids"], with_template)


def test_a_template_that_writes_the_begin_token_does_not_double_it(folder, images):
    captioner = llava(folder)
    plain = captioner.build_inputs(images, NAMES)["input_ids"]
    captioner.processor.chat_template = "{{ '<s>' }}" + captioner.processor.chat_template
    assert torch.equal(captioner.build_inputs(images, NAMES)["input_ids"], plain)


def test_finish_reasons(folder, images, tmp_path):
    plain = llava(folder).describe(images[:1], NAMES[:1])[0]
    assert plain == Caption(plain.text, 16, "length")
    said = plain.text.split()

    # The same weights with another end token: the answer must stop where that token was said.
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    tokenizer = llava(folder).processor.tokenizer
    settings = json.loads((stopped / "generation_config.json").read_text())
    settings["eos_token_id"] = [tokenizer.eos_token_id, tokenizer(f" {said[5]}", add_special_tokens=False).input_ids[0]]
    (stopped / "generation_config.json").write_text(json.dumps(settings))
    first = said.index(said[5])
    ended = llava(stopped).describe(images, NAMES)
    assert ended[0] == Caption(" ".join(said[:first]), first, "end")
    assert all(c.tokens == 16 if c.finish_reason == "length" else c.tokens < 16 for c in ended)


def test_sampling_depends_on_seed_and_image_alone(folder, images):
    hot = llava(folder, temperature=0.8)
    batch = hot.describe(images, NAMES)
    assert [hot.describe([i], [n])[0] for i, n in zip(images, NAMES, strict=True)] == batch
    assert hot.describe(images[::-1], NAMES[::-1]) == batch[::-1]
    assert llava(folder, temperature=0.8).describe(images, NAMES) == batch
    assert llava(folder, temperature=0.8, seed=1).describe(images, NAMES) != batch
    assert llava(folder).describe(images, NAMES) != batch


def test_sampling_leaves_the_global_generator_alone(folder, images):
    state = torch.get_rng_state()
    llava(folder, temperature=0.8).describe(images[:2], NAMES[:2])
    assert torch.equal(torch.get_rng_state(), state)


def test_gumbel_noise_samples_the_softmax():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    noise = GumbelNoise(0.7, seeds=[5])
    drawn = [int(noise(torch.zeros(1, 1), scores).argmax()) for _ in range(4000)]
    frequency = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    assert torch.allclose(frequency, (scores[0] / 0.7).softmax(0), atol=0.03)


def limit_batch(captioner, most):
    """Let the model run out of memory above `most` images, and record the batches it was given."""
    seen = []

    def check(module, args, kwargs):
        size = len(kwargs["input_ids"])
        seen.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    captioner.model.register_forward_pre_hook(check, with_kwargs=True)
    return seen


def test_out_of_memory_halves_the_batch_and_goes_on(folder, images, capsys):
    expected = llava(folder).describe(images, NAMES)
    captioner = llava(folder)
    seen = limit_batch(captioner, most=3)
    assert captioner.describe(images, NAMES) == expected
    said = [line for line in capsys.readouterr().err.splitlines() if "out of CUDA memory" in line]
    assert said == [
        "caption: out of CUDA memory at batch 8, going on at 4",
        "caption: out of CUDA memory at batch 4, going on at 2",
    ]
    seen.clear()
    captioner.describe(images, NAMES)
    assert max(seen) == 2


def test_out_of_memory_at_one_image_is_raised(folder, images):
    captioner = llava(folder)
    limit_batch(captioner, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        captioner.describe(images, NAMES)


def test_missing_weights_name_the_remedy(folder, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        llava(tmp_path / "nowhere", revision="1a2b3c")
    assert f"cannot load LLaVA from {tmp_path / 'nowhere'}" in str(error.value)
    command = f"hf download llava-hf/llava-1.5-7b-hf --revision 1a2b3c --local-dir {tmp_path / 'nowhere'}"
    assert str(error.value).endswith(command)

    half = tmp_path / "half"
    shutil.copytree(folder, half)
    (half / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="hf download"):
        llava(half)


def test_pickled_weights_are_not_loaded(folder, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    torch.save(llava(folder).model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="hf download"):
        llava(pickled)


def test_missing_weights_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as error:
        llava("nobody/no-such-llava")
    assert str(error.value).endswith("hf download nobody/no-such-llava")
    assert error.value.__cause__ is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "llava-hf/llava-1.5-7b-hf"),
        ({"prompt": "Describe."}, "class_name"),
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        load_captioner("llava", **{"model": "folder/of/llava", **DEFAULTS, **changed})


def test_unknown_captioner():
    with pytest.raises(ValueError, match="blip"):
        load_captioner("blip", model=None, **DEFAULTS)


def test_half_precision_runs(folder, images):
    captions = llava(folder, dtype="bfloat16").describe(images[:2], NAMES[:2])
    assert all(caption.text for caption in captions)


def test_one_class_name_per_image(folder, images):
    for captioner in (llava(folder), load_captioner("measured", model=None, **DEFAULTS)):
        with pytest.raises(ValueError, match="shorter"):
            captioner.describe(images, NAMES[:-1])


def test_the_same_seed_builds_the_same_weights(folder, tmp_path):
    build_tiny_llava(tmp_path / "again")
    build_tiny_llava(tmp_path / "other", seed=1)

    def digest(path):
        return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()

    assert digest(tmp_path / "again") == digest(folder)
    assert digest(tmp_path / "other") != digest(folder)
    assert not list(folder.glob("*.bin"))


def test_tiny_answers_are_words(folder, images):
    text = " ".join(c.text for c in llava(folder).describe(images, NAMES))
    assert text.isprintable()
    assert all(word.isalpha() for word in text.split())


def test_measured_captions(images):
    captioner = load_captioner("measured", model=None, **DEFAULTS)
    captions = captioner.describe([*images[:-1], images[-1].convert("L")], NAMES)
    for caption, name in zip(captions, NAMES, strict=True):
        assert caption.text.startswith(f"The {name} in the image ")
        assert caption == Caption(caption.text, len(caption.text.split()), "end")
