"""Tiny models of other architectures than LLaVA's, with random weights, for what must hold of any."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from vlcp_dist.models.captioner import without_videos
from vlcp_dist.models.tiny_llava import CHAT_TEMPLATE, IMAGE_SIZE, PATCH_SIZE, build_tiny_llava

SPREAD = 0.2  # wide weights, so that answers differ
VISION = {
    "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": SPREAD,
}  # fmt: skip
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")


def _text(tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "initializer_range": SPREAD,
    }  # fmt: skip


def _save(model_class, config, processor, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
    # A model's own settings for generation count: this one changes scores by what was said before.
    model.generation_config.repetition_penalty = 1.05
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path):
    build_tiny_llava(folder / "llava")
    return AutoTokenizer.from_pretrained(folder / "llava")


def build_tiny_llava_next(folder: Path) -> Path:
    """As many image tokens as an image has tiles: prompts of different lengths."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    tokenizer = _tokenizer(folder)
    grid = [[32, 64], [64, 32], [64, 64]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_grid_pinpoints=grid,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    return _save(LlavaNextForConditionalGeneration, config, processor, folder)


def build_tiny_qwen2_vl(folder: Path) -> Path:
    """Positions in three dimensions, and pixels of all images joined in one dimension."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil, Qwen2VLProcessor

    tokenizer = _tokenizer(folder)
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    start, end, image, video = tokenizer.convert_tokens_to_ids(names)
    tokenizer.image_token, tokenizer.video_token = names[2:]
    processor = without_videos(Qwen2VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, patch_size=8, merge_size=2, temporal_patch_size=1
        ),
        tokenizer=tokenizer,
        chat_template=QWEN_TEMPLATE,
    )
    config = Qwen2VLConfig(
        text_config={**_text(tokenizer), "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
        vision_config={
            "depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 1, "initializer_range": SPREAD,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    return _save(Qwen2VLForConditionalGeneration, config, processor, folder)


def build_tiny_sliding_llava(folder: Path) -> Path:
    """LLaVA over a Mistral whose attention sees a window of the last tokens: no cache of places holds that."""
    from transformers import AutoProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    tokenizer = _tokenizer(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=MistralConfig(**_text(tokenizer), sliding_window=24),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    processor = AutoProcessor.from_pretrained(folder / "llava")
    return _save(LlavaForConditionalGeneration, config, processor, folder)
