"""Captioners through the real path: tiny models of several architectures from disk, and the measured one."""

import hashlib
import importlib.util
import json
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import build_tiny_llava_next, build_tiny_qwen2_vl, build_tiny_sliding_llava
from vlcp_dist.models import decoding
from vlcp_dist.models.captioner import Caption, load_captioner
from vlcp_dist.models.decoding import collate, end_tokens
from vlcp_dist.models.tiny_llava import build_tiny_llava
from vlcp_dist.ops.sampling import GumbelNoise
from vlcp_dist.schema import PROMPT

NAMES = ["dog", "Saluki, gazelle hound", "ship", "cat", "golf ball", "frog", "French horn", "digit {three}"]
PROMPTS = [PROMPT.replace("{class_name}", name) for name in NAMES]
DEFAULTS = {
    "revision": None,
    "prompt": PROMPT,
    "max_new_tokens": 16,
    "temperature": 0.0,
    "batch_size": 8,
    "attention": "sdpa",
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


def describe(captioner, images, names):
    return captioner.describe([captioner.prepare(image, name) for image, name in zip(images, names, strict=True)])


def generated(captioner, images, names, temperature=0.0):
    """The texts that transformers' own `generate` makes of one image at a time."""
    model, tokenizer = captioner.decoder.model, captioner.prompter.processor.tokenizer
    texts = []
    for image, name in zip(images, names, strict=True):
        request = captioner.prepare(image, name)
        inputs = collate([request.inputs], tokenizer.pad_token_id, model)
        noise = [GumbelNoise(temperature, [request.seed])] if temperature else []
        tokens = model.generate(
            **inputs, max_new_tokens=request.max_new_tokens, do_sample=False, logits_processor=noise
        )
        new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        new = new[:-1] if new[-1] in end_tokens(model) else new
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


@pytest.fixture(scope="module", params=[build_tiny_llava_next, build_tiny_qwen2_vl, build_tiny_sliding_llava])
def other(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def test_another_architecture_says_what_its_generate_says(other, images, capsys):
    captioner = llava(other, batch_size=3)
    requests = [captioner.prepare(image, name) for image, name in zip(images, NAMES, strict=True)]
    captions = captioner.describe(requests)
    assert [caption.text for caption in captions] == generated(captioner, images, NAMES)
    assert len({caption.text for caption in captions}) >= 6
    sliding = "DynamicSlidingWindowLayer" in capsys.readouterr().err  # said where places cannot hold what it keeps
    assert sliding == (not captioner.decoder.in_places) == ("sliding" in other.name)

    # What is prepared image by image is what the model's processor makes of all at once.
    processor = captioner.prompter.processor
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in PROMPTS]
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    whole = processor(images=images, text=texts, padding=True, return_tensors="pt")
    batch = collate([request.inputs for request in requests], processor.tokenizer.pad_token_id, captioner.decoder.model)
    assert set(batch) == set(whole) and all(torch.equal(batch[name], whole[name]) for name in whole)


def test_sequences_end_at_different_times_and_give_their_places_away(folder, images):
    captioner = llava(folder, batch_size=3, max_new_tokens=40)
    decoder = captioner.decoder
    # The words that some of its answers hold become its ends: answers of many lengths, some of none.
    said = captioner.describe([captioner.prepare(images[0], NAMES[0])])[0].text.split()
    tokenizer = captioner.prompter.processor.tokenizer
    ends = [tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in said[3:9:2]]
    decoder.model.generation_config.eos_token_id = ends
    widths = []
    decoder.model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    captions = describe(captioner, images * 3, NAMES * 3)
    steps = [rows for rows, length in widths if length == 1]
    assert [caption.text for caption in captions[:8]] == generated(captioner, images, NAMES)
    assert captions == captions[:8] * 3
    tokens = [caption.tokens for caption in captions]
    assert len(set(tokens)) >= 4 and {caption.finish_reason for caption in captions} == {"end", "length"}
    assert max(steps) == 3 and len(steps) < len(captions) / 3 * max(tokens)
    assert all(caption.seconds > 0 for caption in captions)


def test_a_batch_equals_single_runs(folder, images):
    captioner = llava(folder)
    batch = describe(captioner, images, NAMES)
    single = [describe(captioner, [image], [name])[0] for image, name in zip(images, NAMES, strict=True)]
    assert batch == single
    assert [caption.text for caption in batch] == generated(captioner, images, NAMES)
    # Otherwise equality would say nothing: the answers must depend on the image and on the name.
    assert len({caption.text for caption in batch}) >= 6
    swapped = describe(captioner, images, NAMES[1:] + NAMES[:1])
    assert [c.text for c in swapped] != [c.text for c in batch]
    assert captioner.describe([]) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(folder, images, batch_size):
    assert describe(llava(folder, batch_size=batch_size), images, NAMES) == describe(llava(folder), images, NAMES)


def test_the_prompt_is_the_papers(folder, images):
    captioner = llava(folder)
    assert PROMPT == (
        "Describe the physical appearance of the {class_name} in the image. "
        "Include details about its shape, posture, color, and any distinct features."
    )
    for name, image in zip(NAMES, images, strict=True):
        text = captioner.prompter.processor.tokenizer.decode(captioner.prepare(image, name).inputs["input_ids"][0])
        assert text == (
            "<s>USER: " + "<image>" * 16 + f"\nDescribe the physical appearance of the {name} in the image. "
            "Include details about its shape, posture, color, and any distinct features. ASSISTANT:"
        )


def prompts(captioner, images):
    return [
        captioner.prepare(image, name).inputs["input_ids"].tolist() for image, name in zip(images, NAMES, strict=True)
    ]


def test_the_text_of_a_class_is_tokenized_once(folder, images, monkeypatch):
    captioner = llava(folder)
    tokenizer = type(captioner.prompter.processor.tokenizer)
    calls, original = [], tokenizer.__call__
    monkeypatch.setattr(tokenizer, "__call__", lambda self, text, **k: calls.append(text) or original(self, text, **k))
    for image in images:
        captioner.prepare(image, "dog")
    assert len(calls) == 1
    monkeypatch.setattr("vlcp_dist.models.captioner.TEXTS", 1)
    captioner.prepare(images[0], "cat")
    captioner.prepare(images[0], "dog")
    assert len(calls) == 3


def test_without_a_chat_template_the_prompt_takes_llavas_form(folder, images):
    with_template = prompts(llava(folder), images)
    captioner = llava(folder)
    captioner.prompter.processor.chat_template = None
    assert prompts(captioner, images) == with_template


def test_a_template_that_writes_the_begin_token_does_not_double_it(folder, images):
    plain = prompts(llava(folder), images)
    captioner = llava(folder)
    captioner.prompter.processor.chat_template = "{{ '<s>' }}" + captioner.prompter.processor.chat_template
    assert prompts(captioner, images) == plain


def test_finish_reasons(folder, images, tmp_path):
    plain = describe(llava(folder), images[:1], NAMES[:1])[0]
    assert plain == Caption(plain.text, 16, "length")
    said = plain.text.split()

    # The same weights with another end token: the answer must stop where that token was said.
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    tokenizer = llava(folder).prompter.processor.tokenizer
    settings = json.loads((stopped / "generation_config.json").read_text())
    settings["eos_token_id"] = [tokenizer.eos_token_id, tokenizer(f" {said[5]}", add_special_tokens=False).input_ids[0]]
    (stopped / "generation_config.json").write_text(json.dumps(settings))
    first = said.index(said[5])
    ended = describe(llava(stopped), images, NAMES)
    assert ended[0] == Caption(" ".join(said[:first]), first, "end")
    assert all(c.tokens == 16 if c.finish_reason == "length" else c.tokens < 16 for c in ended)


def test_sampling_depends_on_seed_and_image_alone(folder, images):
    hot = llava(folder, temperature=0.8)
    batch = describe(hot, images, NAMES)
    assert [describe(hot, [i], [n])[0] for i, n in zip(images, NAMES, strict=True)] == batch
    assert [caption.text for caption in batch] == generated(hot, images, NAMES, temperature=0.8)
    assert describe(hot, images[::-1], NAMES[::-1]) == batch[::-1]
    assert describe(llava(folder, temperature=0.8, batch_size=3), images, NAMES) == batch
    assert describe(llava(folder, temperature=0.8, seed=1), images, NAMES) != batch
    assert describe(llava(folder), images, NAMES) != batch


def test_sampling_leaves_the_global_generator_alone(folder, images):
    state = torch.get_rng_state()
    describe(llava(folder, temperature=0.8), images[:2], NAMES[:2])
    assert torch.equal(torch.get_rng_state(), state)


def limit_batch(captioner, most):
    """Let the model run out of memory above `most` images, and record the batches it was given."""
    seen = []

    def check(module, args, kwargs):
        size = len(kwargs["input_ids"])
        seen.append(size)
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    captioner.decoder.model.register_forward_pre_hook(check, with_kwargs=True)
    return seen


@pytest.mark.parametrize("sliding", [False, True])
def test_out_of_memory_halves_the_batch_and_goes_on(folder, images, capsys, tmp_path, sliding):
    model = build_tiny_sliding_llava(tmp_path) if sliding else folder
    expected = describe(llava(model), images, NAMES)
    captioner = llava(model)
    seen = limit_batch(captioner, most=3)
    assert describe(captioner, images, NAMES) == expected
    said = [line for line in capsys.readouterr().err.splitlines() if "out of CUDA memory" in line]
    assert said == [
        "caption: out of CUDA memory at batch 8, going on at 4",
        "caption: out of CUDA memory at batch 4, going on at 2",
    ]
    seen.clear()
    describe(captioner, images, NAMES)
    assert max(seen) == 2


def test_out_of_memory_while_decoding_loses_no_sequence(folder, images):
    expected = describe(llava(folder), images, NAMES)
    captioner = llava(folder)
    steps = []

    def check(module, args, kwargs):
        steps.append(kwargs["input_ids"].shape)
        if len(steps) in (6, 20):
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    captioner.decoder.model.register_forward_pre_hook(check, with_kwargs=True)
    assert describe(captioner, images, NAMES) == expected
    assert steps[5][1] == steps[19][1] == 1  # decoding, not running prompts
    assert captioner.decoder.batch_size == 2


def test_an_answer_longer_than_the_room_it_had(folder, images, monkeypatch):
    expected = describe(llava(folder, max_new_tokens=90), images, NAMES)
    monkeypatch.setattr(decoding, "FIRST_ROOM", 1)
    assert describe(llava(folder, max_new_tokens=90, batch_size=3), images, NAMES) == expected


def test_out_of_memory_at_one_image_is_raised(folder, images):
    captioner = llava(folder)
    limit_batch(captioner, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        describe(captioner, images, NAMES)


def test_missing_weights_name_the_remedy(folder, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        llava(tmp_path / "nowhere", revision="1a2b3c")
    assert f"cannot load {tmp_path / 'nowhere'}: no config.json" in str(error.value)
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
    torch.save(llava(folder).decoder.model.state_dict(), pickled / "pytorch_model.bin")
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


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_attention_that_is_not_installed(folder):
    with pytest.raises(ValueError, match=r"caption\.attention=flash_attention_2 does not work here.*sdpa does"):
        llava(folder, attention="flash_attention_2")


def test_unknown_captioner():
    with pytest.raises(ValueError, match="blip"):
        load_captioner("blip", model=None, **DEFAULTS)


def test_half_precision_runs(folder, images):
    captions = describe(llava(folder, dtype="bfloat16"), images[:2], NAMES[:2])
    assert all(caption.text for caption in captions)


def test_the_same_seed_builds_the_same_weights(folder, tmp_path):
    build_tiny_llava(tmp_path / "again")
    build_tiny_llava(tmp_path / "other", seed=1)

    def digest(path):
        return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()

    assert digest(tmp_path / "again") == digest(folder)
    assert digest(tmp_path / "other") != digest(folder)
    assert not list(folder.glob("*.bin"))


def test_tiny_answers_are_words(folder, images):
    text = " ".join(c.text for c in describe(llava(folder), images, NAMES))
    assert text.isprintable()
    assert all(word.isalpha() for word in text.split())


def test_measured_captions(images):
    captioner = load_captioner("measured", model=None, **DEFAULTS)
    captions = describe(captioner, [*images[:-1], images[-1].convert("L")], NAMES)
    for caption, name in zip(captions, NAMES, strict=True):
        assert caption.text.startswith(f"The {name} in the image ")
        assert caption == Caption(caption.text, len(caption.text.split()), "end")
