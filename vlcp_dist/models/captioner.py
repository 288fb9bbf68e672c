"""Images and class names to descriptions: an image-text-to-text model of transformers, or measurements without one."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image

from vlcp_dist.models import memory, weights
from vlcp_dist.ops.describe import describe_image

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from vlcp_dist.models.decoding import Answer, Decoder, Inputs, Request

LLAVA = "llava-hf/llava-1.5-7b-hf"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TEXTS = 512  # kept at a time: shards are sorted by class
Attention = Literal["sdpa", "flash_attention_2"]


@dataclass(frozen=True)
class Caption:
    """`tokens` counts what was generated, end token excluded; a measured description counts words.

    `seconds` go from the start of its generation to its end, beside others of the batch.
    """

    text: str
    tokens: int
    finish_reason: Literal["end", "length"]
    seconds: float = field(default=0.0, compare=False)


class Captioner(Protocol):
    def prepare(self, image: Image.Image, class_name: str) -> Any:
        """All of an image's description that needs no GPU. May run in any thread, in any order."""
        ...

    def describe(self, prepared: Iterable[Any]) -> list[Caption]:
        """One caption for each prepared image, in their order. They are taken from the iterable as there is room."""
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
    attention: Attention,
    device: str,
    dtype: str,
    seed: int,
) -> Captioner:
    """Load the captioner "llava" or "measured"; the latter needs no model and uses none of the other arguments.

    Args:
        model: folder or hub id of an image-text-to-text model in transformers' layout, LLaVA or another.
        prompt: holds `{class_name}`.
        temperature: 0 is greedy. Above, a caption is a function of seed, image and prompt alone.
        batch_size: images generated together at most; fewer where CUDA's memory does not hold them.
        attention: "sdpa", or "flash_attention_2" where the package flash-attn is installed.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        FileNotFoundError: weights are missing; the message holds the command that fetches them.
        ValueError: an argument out of its range, or a GPU that is too small.
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
    files = weights.find_weights(model, revision, default=LLAVA)
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vlcp_dist.models.decoding import Decoder

    source: Any = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model, **source)
        kind: Any = PROCESSOR_MAPPING.get(type(config), None)
        Processor: Any = without_videos(kind) if kind else AutoProcessor
        processor = Processor.from_pretrained(model, **source)
        prompter = Prompter(processor, prompt, DTYPES[dtype], device == "cuda")
        if device == "cuda":
            parameters = sum(weights.count_parameters(path) for path in files)
            batch_size = fitting_batch(
                need(config, parameters, prompter.length + max_new_tokens, dtype, batch_size),
                torch.cuda.mem_get_info()[0],
                torch.cuda.get_device_name(),
            )
        network = AutoModelForImageTextToText.from_pretrained(
            model,
            config=config,
            dtype=DTYPES[dtype],
            device_map=device,
            attn_implementation=attention,
            use_safetensors=True,
            **source,
        )
    except ImportError as error:
        raise ValueError(f"caption.attention={attention} does not work here: {error}; sdpa does") from error
    except OSError as error:
        command = weights.download_command(model, revision, LLAVA)
        raise FileNotFoundError(f"cannot load {model}: {error}\nFetch its weights with:\n    {command}") from None
    decoder = Decoder(
        network.eval(),
        pad_token_id=prompter.processor.tokenizer.pad_token_id,
        temperature=temperature,
        batch_size=batch_size,
    )
    return VisionLanguageCaptioner(prompter, decoder, max_new_tokens, seed if temperature else None)


def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor's class without its part for videos, which needs torchvision (Qwen-VL, InternVL, ... have one)."""
    parts = [part for part in kind.get_attributes() if "video" not in part]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: parts)})


def need(config: Any, parameters: int, tokens: int, dtype: str, batch_size: int) -> memory.Need:
    """What a model of this configuration of transformers needs for sequences of `tokens`."""
    from vlcp_dist.models.decoding import PREFILL

    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    return memory.Need(
        parameters=parameters,
        layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        tokens=tokens,
        prefill=PREFILL,
        dtype=dtype,
        batch_size=batch_size,
    )


def fitting_batch(needed: memory.Need, available: int, gpu: str) -> int:
    """The batch asked for, or, said aloud, the largest that fits into `available` bytes.

    Raises:
        ValueError: not even one sequence fits; the message has the numbers and what would fit.
    """
    batch = memory.largest_batch(needed, available)
    if not batch:
        raise ValueError(memory.too_small(needed, available, gpu))
    if batch < needed.batch_size:
        print(f"caption: {gpu} holds a batch of {batch}, not {needed.batch_size}: going on with that", file=sys.stderr)
    return batch


class MeasuredCaptioner:
    """Descriptions made of measured facts (`ops.describe`)."""

    def prepare(self, image: Image.Image, class_name: str) -> Caption:
        began = time.perf_counter()
        text = describe_image(np.asarray(image.convert("RGB")), class_name)
        return Caption(text, len(text.split()), "end", time.perf_counter() - began)

    def describe(self, prepared: Iterable[Caption]) -> list[Caption]:
        return list(prepared)


class Prompter:
    """A model's own processor and chat template. What the text comes to is kept for each class and size of image.

    `length` is the number of tokens of a prompt, image tokens included, for an image of ImageNet's usual size.
    """

    def __init__(self, processor: ProcessorMixin, prompt: str, dtype: torch.dtype, pin: bool):
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        self.processor = processor
        self.prompt = prompt
        self._dtype = dtype
        self._pin = pin
        self._texts: dict[tuple[Any, ...], Inputs] = {}
        self._lock = threading.Lock()  # the tokenizer is not for several threads
        usual = Image.new("RGB", (500, 375))
        whole, pixels = self._whole(usual, "dog"), self._pixels(usual)
        # Whether the image's part of the inputs can be made without the text's.
        self._apart = all(name in whole and torch.equal(whole[name], pixels[name]) for name in pixels)
        self.length = whole["input_ids"].shape[1]

    def inputs(self, image: Image.Image, class_name: str) -> Inputs:
        """What the processor makes of one RGB image and its prompt, floats in the model's dtype, on the CPU."""
        if self._apart:
            pixels = self._pixels(image)
            key = class_name, *(_signature(name, value) for name, value in pixels.items())
            text = self._texts.get(key)
            if text is None:
                text = {name: value for name, value in self._whole(image, class_name).items() if name not in pixels}
                if len(self._texts) >= TEXTS:
                    self._texts.clear()
                self._texts[key] = text
            made = text | pixels
        else:
            made = self._whole(image, class_name)
        made = {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in made.items()}
        return {name: value.pin_memory() for name, value in made.items()} if self._pin else made

    def _pixels(self, image: Image.Image) -> Inputs:
        return dict(self.processor.image_processor(images=[image], return_tensors="pt"))

    def _whole(self, image: Image.Image, class_name: str) -> Inputs:
        text = self._conversation(self.prompt.replace("{class_name}", class_name))
        begin = self.processor.tokenizer.bos_token
        begun = begin is not None and text.startswith(begin)
        with self._lock:
            return dict(self.processor(images=[image], text=[text], add_special_tokens=not begun, return_tensors="pt"))

    def _conversation(self, prompt: str) -> str:
        if self.processor.chat_template is None:
            return f"USER: <image>\n{prompt} ASSISTANT:"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


class VisionLanguageCaptioner:
    """A loaded model. A caption does not depend on its neighbours in the batch, beyond float rounding."""

    def __init__(self, prompter: Prompter, decoder: Decoder, max_new_tokens: int, seed: int | None):
        """`seed` None: greedy, so that images need no seed of their own."""
        self.prompter = prompter
        self.decoder = decoder
        self._max_new_tokens = max_new_tokens
        self._seed = seed

    def prepare(self, image: Image.Image, class_name: str) -> Request:
        from vlcp_dist.models.decoding import Request

        image = image.convert("RGB")
        seed = 0 if self._seed is None else _caption_seed(self._seed, image, self.prompter.prompt, class_name)
        return Request(self.prompter.inputs(image, class_name), self._max_new_tokens, seed)

    def describe(self, prepared: Iterable[Request]) -> list[Caption]:
        """Raises torch.OutOfMemoryError when even one image does not fit."""
        return [self._caption(answer) for answer in self.decoder.run(iter(prepared))]

    def _caption(self, answer: Answer) -> Caption:
        text = self.prompter.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        return Caption(text, len(answer.tokens), answer.finish_reason, answer.seconds)


def _signature(name: str, value: torch.Tensor) -> tuple[Any, ...]:
    """What of an image the number of its tokens may depend on: shapes, and the few whole numbers that say its size."""
    small = not value.is_floating_point() and value.numel() <= 16
    return name, value.shape, tuple(value.flatten().tolist()) if small else None


def _caption_seed(seed: int, image: Image.Image, prompt: str, class_name: str) -> int:
    prompt = prompt.replace("{class_name}", class_name)
    digest = hashlib.sha256(f"{seed}\0{image.size}\0{prompt}\0".encode() + image.tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
