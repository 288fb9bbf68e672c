"""Keywords to a sentence by a language model: the prompts of the strategy GGS (Table 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

INSTRUCTION = (
    "Write one sentence that describes a photo of the following object. Mention its features.\n"
    "Object: {class_name}\nFeatures: {keywords}\nSentence:"
)
MAX_NEW_TOKENS = 77  # about what one window of Stable Diffusion's text encoder holds
BATCH = 32


class SentenceWriter:
    """A causal language model of transformers, by folder or hub id; it writes greedily, so always the same.

    Raises:
        FileNotFoundError: weights are missing; the message holds the command that fetches them.
    """

    def __init__(self, model: str, *, revision: str | None, device: str, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        except OSError as error:
            at = f" --revision {revision}" if revision else ""
            raise FileNotFoundError(
                f"cannot load the language model synthesize.sentence_model={model}: {error}\n"
                f"Fetch its weights with:\n    hf download {model}{at}"
            ) from None
        self._model = loaded.to(device).eval()
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def write(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
        """A sentence for every (class name, keywords); the first line of the answer.

        Raises:
            ValueError: the model has nothing to say, which names the class.
        """
        sentences = []
        for start in range(0, len(items), BATCH):
            part = items[start : start + BATCH]
            answers = self._generate([self._question(name, words) for name, words in part])
            for (name, _), answer in zip(part, answers, strict=True):
                if not (line := answer.strip().partition("\n")[0].strip()):
                    raise ValueError(f"synthesize.sentence_model wrote nothing for {name!r}; take another model")
                sentences.append(line)
        return sentences

    def _question(self, class_name: str, keywords: Sequence[str]) -> str:
        text = INSTRUCTION.format(class_name=class_name, keywords=", ".join(keywords))
        if self._tokenizer.chat_template is None:
            return text
        turns = [{"role": "user", "content": text}]
        return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    @torch.inference_mode()
    def _generate(self, questions: list[str]) -> list[str]:
        tokenizer = self._tokenizer
        begun = bool(tokenizer.bos_token) and questions[0].startswith(tokenizer.bos_token)
        inputs = tokenizer(questions, padding=True, add_special_tokens=not begun, return_tensors="pt")
        tokens = self._model.generate(
            input_ids=inputs["input_ids"].to(self._model.device),
            attention_mask=inputs["attention_mask"].to(self._model.device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
