"""Descriptions as the U-Net sees them in training: cut at 77 tokens, encoded by CLIP, rounded to fp16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vlcp_dist.models.diffusion import missing_weights, quiet


def load_tokenizer(model: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a Stable Diffusion folder or hub id.

    Raises:
        FileNotFoundError: it is missing; the message holds the command that fetches it.
    """
    with quiet(), missing_weights(model, revision):
        import transformers

        CLIPTokenizer: Any = transformers.CLIPTokenizer
        return CLIPTokenizer.from_pretrained(model, subfolder="tokenizer", revision=revision)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Token ids (n, 77), cut or padded: uint16, which holds CLIP's 49,408, or int32 for a larger vocabulary."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    if not texts:
        return np.empty((0, tokenizer.model_max_length), dtype)
    ids = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="np"
    ).input_ids
    return np.asarray(ids).astype(dtype)


class TextEncoder:
    """The frozen CLIP text encoder of a Stable Diffusion folder or hub id, for token ids.

    Raises:
        FileNotFoundError: weights are missing; the message holds the command that fetches them.
    """

    def __init__(self, model: str, *, revision: str | None, device: str | torch.device, dtype: torch.dtype):
        with quiet(), missing_weights(model, revision):
            import transformers

            CLIPTextModel: Any = transformers.CLIPTextModel
            encoder = CLIPTextModel.from_pretrained(
                model, subfolder="text_encoder", revision=revision, dtype=dtype, use_safetensors=True
            )
        self._encoder: Any = encoder.to(device).eval().requires_grad_(False)
        self.width: int = self._encoder.config.hidden_size

    @torch.no_grad()
    def __call__(self, ids: np.ndarray | torch.Tensor) -> torch.Tensor:
        """fp16 (b, 77, width) on the encoder's device: rounded, so that cached embeddings are the same."""
        tokens = torch.as_tensor(np.asarray(ids).astype(np.int64)).to(self._encoder.device)
        hidden: torch.Tensor = self._encoder(tokens)[0]
        return hidden.half()


def embedding_bytes(model: str, *, revision: str | None) -> int:
    """Bytes of one description's embedding in fp16: 118 KB for SD v1-5, where a latent has 32 KB."""
    with quiet(), missing_weights(model, revision):
        import transformers

        CLIPTextConfig: Any = transformers.CLIPTextConfig
        config = CLIPTextConfig.from_pretrained(model, subfolder="text_encoder", revision=revision)
    return int(config.max_position_embeddings * config.hidden_size * 2)
