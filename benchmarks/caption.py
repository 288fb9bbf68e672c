"""caption.*: descriptions of images a second, against one image at a time through `generate`, and what bounds them.

Weights are random, so a model has no idea when to stop: its end token is switched off and the length of every answer is
set in advance. `--size real` is LLaVA-1.5-7B with answers of 160 tokens; `--size tiny` has lengths that vary.
"""

import statistics
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.photographs import jpegs
from vlcp_dist.data.images import decode
from vlcp_dist.data.prefetch import Ahead
from vlcp_dist.models import tiny_llava
from vlcp_dist.models.captioner import Prompter, fitting_batch, need
from vlcp_dist.models.decoding import Decoder, Request
from vlcp_dist.schema import PROMPT
from vlcp_dist.stages.caption import AHEAD

Row = dict[str, Any]
IMAGENET = 1_281_167
NAMES = ("Saluki, gazelle hound", "golf ball", "French horn", "church, church building")
TOKENS = 160  # of an answer, at most
REPEATS = 3  # of whatever is in batches; medians count
THREADS = 2  # that prepare images


@dataclass(frozen=True)
class Work:
    """A model and what it is given: JPEGs, and how many tokens each answer has."""

    model: Any
    prompter: Prompter
    device: str
    batch_size: int
    images: list[bytes]
    lengths: list[int]
    one_at_a_time: int  # how many of the images the slow way is measured on

    def decoder(self) -> Decoder:
        pad = self.prompter.processor.tokenizer.pad_token_id
        return Decoder(self.model, pad_token_id=pad, temperature=0, batch_size=self.batch_size)


def measure(device: str = "cpu", size: str = "tiny") -> list[Row]:
    """Torch has one thread in every way of doing it; ours has two more that prepare images."""
    torch.set_num_threads(1)
    work = _tiny(device) if size == "tiny" else _real(device)
    rate, waiting = _rate(work, work.decoder())
    emptied, _ = _rate(work, work.decoder(), at_once=work.batch_size)
    by_generate = work.decoder()
    by_generate.in_places = False
    batches, _ = _rate(work, by_generate)
    single = _one_at_a_time(work)
    bound = 1 / _least_seconds(work)
    decoded = _decode_seconds(work.images[:64])
    lengths = f"{min(work.lengths)} to {max(work.lengths)}" if size == "tiny" else f"{TOKENS}, a fixed number"
    told = f"batch {work.batch_size}, tokens an answer: {lengths}"
    saved = f"decoding a JPEG on one core: {100 * decoded * rate:.1f}% of the time it takes to describe it"
    one_pass = f"{saved}; one pass with encode saves that at most"
    return [
        _row("throughput", rate, single, "images/s", note=f"against one at a time; {told}", ceiling=bound),
        _row("refill", rate, emptied, "images/s", note="against places given up, and refilled once all are free"),
        _row("batches", rate, batches, "images/s", note="against batches by generate: all wait for the longest answer"),
        _row("waiting", 100 * waiting, None, "%", note="of the time in which no image was ready"),
        _row("one_pass", 1000 * decoded, 1000 / rate, "ms/image", note=one_pass),
        _row("imagenet", *(IMAGENET / r / 3600 for r in (rate, single)), "hours", note=f"{IMAGENET:,} images on one"),
    ]


def _row(name: str, ours: float, baseline: float | None, unit: str, *, note: str, ceiling: float | None = None) -> Row:
    """The ratio says how many times better ours is."""
    ratio = None
    if baseline is not None:
        ratio = ours / baseline if unit.endswith("/s") else baseline / ours
    return {
        "name": f"caption.{name}", "ours": ours, "baseline": baseline, "ceiling": ceiling, "ratio": ratio,
        "unit": unit, "note": note,
    }  # fmt: skip


def _rate(work: Work, decoder: Decoder, at_once: int | None = None) -> tuple[float, float]:
    """Images a second, and the share of the time in which none was ready. The first round warms up."""
    if work.device == "cuda":
        torch.cuda.empty_cache()  # what other ways of doing it have left
    rounds = [_describe(work, decoder, at_once) for _ in range(REPEATS + 1)][1:]
    seconds = statistics.median(seconds for seconds, _ in rounds)
    return len(work.images) / seconds, statistics.median(waited / seconds for seconds, waited in rounds)


def _describe(work: Work, decoder: Decoder, at_once: int | None) -> tuple[float, float]:
    """As the caption stage does it: seconds, and those of them that were spent waiting for an image.

    The stage hands all of a shard over; `at_once` images, and the next when they are done, is the comparison.
    """

    def prepare(place: int) -> Request:
        image = decode(work.images[place])
        return Request(work.prompter.inputs(image, NAMES[place % len(NAMES)]), work.lengths[place])

    machine.wait(work.device)
    began = time.perf_counter()
    with Ahead(prepare, range(len(work.images)), threads=THREADS, most=AHEAD) as prepared:
        answers = []
        while part := decoder.run(islice(prepared, at_once)):
            answers += part
    seconds = time.perf_counter() - began
    assert [len(answer.tokens) for answer in answers] == work.lengths
    return seconds, prepared.waited


@torch.inference_mode()
def _one_at_a_time(work: Work) -> float:
    """Images a second as the model's own page shows it: processor, generate, next image. The first warms up."""
    processor = work.prompter.processor
    seconds = []
    for i in range(work.one_at_a_time + 1):
        began = time.perf_counter()
        prompt = PROMPT.replace("{class_name}", NAMES[i % len(NAMES)])
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=decode(work.images[i]), text=text, return_tensors="pt")
        inputs = inputs.to(work.device, work.model.dtype)
        tokens = work.model.generate(**inputs, max_new_tokens=work.lengths[i], do_sample=False, pad_token_id=0)
        processor.decode(tokens[0], skip_special_tokens=True)  # which waits for the device
        seconds.append(time.perf_counter() - began)
    return work.one_at_a_time / sum(seconds[1:])


def _decode_seconds(images: list[bytes]) -> float:
    began = time.perf_counter()
    for data in images:
        decode(data)
    return (time.perf_counter() - began) / len(images)


def _least_seconds(work: Work) -> float:
    """Seconds an image takes at least: bytes and operations that cannot be left out, at this machine's measured rates.

    Running a prompt is bound by arithmetic: 2 operations for each parameter and token, and 4 x hidden for each layer
    and pair of tokens, once for the image's tower and once for the text model. A step of decoding reads the text
    model's weights once for all places and the keys and values of each, or is bound by arithmetic if that takes longer.
    """
    model, prompt = work.model, work.prompter.length
    copy = machine.copy_bytes_per_second(work.device)
    flops = machine.matmul_flops_per_second(work.device, model.dtype)
    shape, vision = need(model.config, 0, 1, "float32", 1), model.config.vision_config
    text_model = model.model.language_model
    parameters = sum(p.numel() for p in [*text_model.layers.parameters(), *model.lm_head.parameters()])
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    operations = 2 * parameters * prompt + 2 * shape.layers * shape.hidden * prompt**2
    operations += 2 * tower * patches + 4 * vision.num_hidden_layers * vision.hidden_size * patches**2
    answer = statistics.mean(work.lengths)
    size = model.dtype.itemsize
    kept = 2 * shape.layers * shape.kv_heads * shape.head_dim * size * (prompt + answer / 2)
    reading = (parameters * size / work.batch_size + kept) / copy
    return operations / flops + answer * max(reading, 2 * parameters / flops)


def _tiny(device: str) -> Work:
    """Answers of 125 tokens on average, of 40 to 160: most captions are 80 to 130 words long, and some are cut off."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.rint(rng.normal(125, 30, 160)), 40, TOKENS).astype(int).tolist()
    processor = tiny_llava.build_processor(tiny_llava.IMAGE_SIZE, tiny_llava.PATCH_SIZE)
    config = tiny_llava.build_config(processor.tokenizer)
    return _work(config, processor, device, torch.float32, batch=32, pixels=(160, 120), lengths=lengths, slow=16)


def _real(device: str) -> Work:
    """LLaVA-1.5-7B: CLIP ViT-L/14 at 336 px, and Vicuna 7B."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    processor = tiny_llava.build_processor(336, 14)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
            num_attention_heads=16, projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32_064, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(tiny_llava.IMAGE),
        image_seq_length=576,
    )  # fmt: skip
    lengths = [TOKENS] * 384
    return _work(config, processor, device, torch.bfloat16, batch=128, pixels=(500, 375), lengths=lengths, slow=6)


def _work(
    config: Any,
    processor: Any,
    device: str,
    dtype: torch.dtype,
    *,
    batch: int,
    pixels: tuple[int, int],
    lengths: list[int],
    slow: int,
) -> Work:
    """The model is made where it runs, in its own dtype: 7 billion numbers in float32 would be 28 GB on the way."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    prompter = Prompter(processor, PROMPT, dtype, pin=device == "cuda")
    if device == "cuda":
        # The weights are there already: what is free is for sequences.
        needed = need(config, 0, prompter.length + TOKENS, str(dtype).removeprefix("torch."), batch)
        batch = fitting_batch(needed, torch.cuda.mem_get_info()[0], torch.cuda.get_device_name())
    images = jpegs(len(lengths), *pixels)
    return Work(model, prompter, device, batch, images, lengths, slow)
