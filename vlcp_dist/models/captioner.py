"""Images and class names to descriptions: LLaVA, or measurements where no weights are at hand."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from vlcp_dist.ops.describe import describe_image

if TYPE_CHECKING:
    from transformers import BatchFeature, LlavaForConditionalGeneration, ProcessorMixin

LLAVA = "llava-hf/llava-1.5-7b-hf"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Caption:
    """`tokens` counts what was generated, end token excluded; a measured description counts words."""

    text: str
    tokens: int
    finish_reason: Literal["end", "length"]


class Captioner(Protocol):
    def describe(self, images: list[Image.Image], class_names: list[str]) -> list[Caption]:
        """One caption per image, in order; `class_names` holds each image's class name."""
        ...


def load_captioner(
    captioner: str,
    *,
    model: str | None,
    revision: str | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    device: str,
    dtype: str,
    seed: int,
) -> Captioner:
    """Load the captioner "llava" or "measured"; the latter needs no model and uses none of the other arguments.

    Args:
        model: folder or hub id of a LLaVA in transformers' layout.
        prompt: holds `{class_name}`.
        temperature: 0 is greedy. Above, a caption is a function of seed, image and prompt alone.
        batch_size: images generated together at most; halved for good when CUDA's memory runs out.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        FileNotFoundError: weights are missing; the message holds the command that fetches them.
        ValueError: an argument out of its range.
    """
    if captioner == "measured":
        return MeasuredCaptioner()
    if captioner != "llava":
        raise ValueError(f'captioner must be "llava" or "measured", not {captioner!r}')
    if not model:
        raise ValueError(f"captioner llava needs a model: a folder or a hub id such as {LLAVA}")
    if "{class_name}" not in prompt:
        raise ValueError(f"the prompt must hold {{class_name}}: {prompt!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if batch_size < 1 or max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            "batch_size and max_new_tokens must be at least 1 and temperature at least 0, "
            f"not {batch_size}, {max_new_tokens} and {temperature}"
        )
    with _missing_weights(model, revision):
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        # First, and alone: offline, the processor would try again and again for each of its many optional files.
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
        network = AutoModelForImageTextToText.from_pretrained(
            model,
            config=config,
            revision=revision,
            dtype=DTYPES[dtype],
            device_map=device,
            use_safetensors=True,
            trust_remote_code=False,
        )
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return LlavaCaptioner(network.eval(), processor, prompt, max_new_tokens, temperature, batch_size, seed)


class MeasuredCaptioner:
    """Descriptions made of measured facts (`ops.describe`)."""

    def describe(self, images: list[Image.Image], class_names: list[str]) -> list[Caption]:
        texts = (
            describe_image(np.asarray(image.convert("RGB")), name)
            for image, name in zip(images, class_names, strict=True)
        )
        return [Caption(text, len(text.split()), "end") for text in texts]


@dataclass
class LlavaCaptioner:
    """A loaded LLaVA. A caption does not depend on its neighbours in the batch, beyond float rounding."""

    model: LlavaForConditionalGeneration
    processor: ProcessorMixin
    prompt: str
    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int

    def describe(self, images: list[Image.Image], class_names: list[str]) -> list[Caption]:
        """Captions in the images' order.

        Raises:
            ValueError: not one class name per image.
            torch.OutOfMemoryError: even one image does not fit.
        """
        samples = list(zip(images, class_names, strict=True))
        captions: list[Caption] = []
        while len(captions) < len(samples):
            batch = samples[len(captions) : len(captions) + self.batch_size]
            try:
                done = self._describe_batch(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                done = []
            # Outside the handler: there the exception still holds the batch's tensors.
            if not done:
                self.batch_size = len(batch) // 2
                print(
                    f"caption: out of CUDA memory at batch {len(batch)}, going on at {self.batch_size}",
                    file=sys.stderr,
                )
                torch.cuda.empty_cache()
            captions += done
        return captions

    def build_inputs(self, images: list[Image.Image], class_names: list[str]) -> BatchFeature:
        """Tokens (b, length), padded on the left, their attention mask and the pixels (b, 3, h, w)."""
        texts = [self._conversation(self.prompt.replace("{class_name}", name)) for name in class_names]
        tokenizer = self.processor.tokenizer
        begun = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
        return self.processor(
            images=images, text=texts, padding=True, add_special_tokens=not begun, return_tensors="pt"
        )

    def _conversation(self, prompt: str) -> str:
        if self.processor.chat_template is None:
            return f"USER: <image>\n{prompt} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    @torch.inference_mode()
    def _describe_batch(self, batch: list[tuple[Image.Image, str]]) -> list[Caption]:
        images = [image.convert("RGB") for image, _ in batch]
        names = [name for _, name in batch]
        inputs = self.build_inputs(images, names).to(self.model.device, self.model.dtype)
        processors = []
        if self.temperature > 0:
            prompts = [self.prompt.replace("{class_name}", name) for name in names]
            seeds = [_caption_seed(self.seed, *pair) for pair in zip(images, prompts, strict=True)]
            processors.append(GumbelNoise(self.temperature, seeds))
        tokens = self.model.generate(
            **inputs,
            logits_processor=processors,
            max_new_tokens=self.max_new_tokens,
            # Sampling, too, is an argmax: the noise is in the scores.
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        return [self._caption(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]

    def _caption(self, new_tokens: list[int]) -> Caption:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        length = next((i for i, token in enumerate(new_tokens) if token in ends), None)
        text = self.processor.tokenizer.decode(new_tokens[:length], skip_special_tokens=True).strip()
        if length is None:
            return Caption(text, len(new_tokens), "length")
        return Caption(text, length, "end")


class GumbelNoise:
    """Makes the argmax of the scores a sample at `temperature`, from one generator per row of the batch.

    The argmax of scores / temperature + Gumbel noise is distributed as the softmax of scores / temperature.
    `generate`'s own sampling draws a whole batch from the global generator, so a row would depend on the others.
    """

    def __init__(self, temperature: float, seeds: list[int]):
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        return scores.float() / self.temperature - torch.stack(drawn).log().to(scores.device)


def _caption_seed(seed: int, image: Image.Image, prompt: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{image.size}\0{prompt}\0".encode() + image.tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def _missing_weights(model: str, revision: str | None) -> Iterator[None]:
    """Turn the loaders' various errors for absent files into one that names the remedy."""
    # A hub id is owner/name and names nothing on this disk.
    folder = Path(model).exists() or model.count("/") != 1
    command = f"hf download {LLAVA if folder else model}"
    if revision:
        command += f" --revision {revision}"
    if folder:
        command += f" --local-dir {model}"
    try:
        if folder and not Path(model, "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {model}")
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"cannot load LLaVA from {model}: {error}\nFetch its weights with:\n    {command}"
        ) from None
