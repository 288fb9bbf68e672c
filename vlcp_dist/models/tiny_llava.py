"""LLaVA's architecture at tiny size with random weights: CLIP's vision tower, a projector and a Llama.

Whatever loads LLaVA-1.5 loads this folder too, so the captioning path runs in full without downloads. Its answers are
words drawn from TEXT without sense, but they depend on the image and the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

IMAGE_SIZE, PATCH_SIZE = 32, 8
VOCAB_SIZE = 800
BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
# The turns of LLaVA-1.5: images first, then the text.
CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'].upper() }}: "
    "{% for part in turn['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT = (
    "USER: ASSISTANT: Describe the physical appearance of the animal in the image. Include details about its shape, "
    "posture, color, and any distinct features.",
    "The dog in the image has a long, slender body with a short brown coat and white markings on its chest.",
    "A small bird stands on a thin branch; its wings are folded, its beak is yellow and its eyes are dark.",
    "The truck is large and red, seen from the left, with a grey trailer, round black wheels and bright lamps.",
    "The digit in the picture is tall and narrow, leaning to the right, with one closed loop in its lower half.",
    "Its posture is upright and calm, the head turned toward the camera, the ears soft and the tail curved.",
    "The church has a pointed steeple, arched windows and pale stone walls under a clear blue sky.",
    "The green frog sits low on a wet leaf, its smooth skin shining, its legs bent and its throat light.",
)


def build_tiny_llava(folder: str | Path, *, seed: int = 0) -> None:
    """Save a LLaVA of about 0.2 million random parameters, with its processor, at `folder` (safetensors).

    The same seed gives the same bytes of the weights. Takes about a second.
    """
    from transformers import LlavaForConditionalGeneration

    processor = build_processor(IMAGE_SIZE, PATCH_SIZE)
    tokenizer = processor.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config(tokenizer))
    # Only whole words and the end are ever said: loose bytes would make answers that are no text.
    known = {" " + word for text in TEXT for word in text.split() if word.isalpha()}
    spoken = [index for index in range(len(tokenizer)) if tokenizer.decode([index]) in known | {EOS}]
    silent = torch.ones(len(tokenizer), dtype=torch.bool)
    silent[spoken] = False
    with torch.no_grad():
        model.lm_head.weight[silent] = 0.0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_processor(image_size: int, patch_size: int) -> LlavaProcessor:
    """LLaVA's processor for square images of so many pixels, with a tokenizer learned from TEXT."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        ),
        tokenizer=_train_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy "default" leaves out again
        chat_template=CHAT_TEMPLATE,
    )


def _train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from TEXT; begins every text with BOS as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    learner.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[BOS, EOS, PAD, IMAGE],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, learner.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The tiny architecture for this tokenizer."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    # Wide initial weights: with the usual 0.02 every image would get the same answer.
    spread = 0.2
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            initializer_range=spread,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=spread,
        ),
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )
