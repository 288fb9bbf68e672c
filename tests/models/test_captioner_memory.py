"""What a captioner needs of a GPU: the arithmetic, and what is said where there is too little."""

from dataclasses import replace

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from vlcp_dist.models.captioner import fitting_batch, need
from vlcp_dist.models.memory import OVERHEAD, Need, largest_batch

GIB = 2**30
LLAVA_7B = Need(
    parameters=7_063_427_072, layers=32, kv_heads=32, head_dim=128, hidden=4096, intermediate=11_008,
    tokens=620 + 160, prefill=16, dtype="bfloat16", batch_size=128,
)  # fmt: skip


def test_llava_7b_by_hand():
    assert LLAVA_7B.weights == 2 * 7_063_427_072
    assert LLAVA_7B.sequence == 2 * 32 * 32 * 128 * 780 * 2 == pytest.approx(0.38 * GIB, rel=0.01)
    assert LLAVA_7B.total == int(LLAVA_7B.weights + 128 * LLAVA_7B.sequence + LLAVA_7B.working + OVERHEAD)
    assert replace(LLAVA_7B, dtype="float32").weights == 2 * LLAVA_7B.weights
    grouped = replace(LLAVA_7B, kv_heads=8)
    assert grouped.sequence == LLAVA_7B.sequence // 4


def test_the_largest_batch_is_the_last_that_fits():
    for available in (20 * GIB, 40 * GIB, 60 * GIB):
        batch = largest_batch(LLAVA_7B, available)
        assert 0 < batch < 128
        assert replace(LLAVA_7B, batch_size=batch).total <= available < replace(LLAVA_7B, batch_size=batch + 1).total
    assert largest_batch(LLAVA_7B, 200 * GIB) == 128
    assert largest_batch(LLAVA_7B, 12 * GIB) == 0


def test_a_gpu_that_is_too_small_is_told_with_numbers_and_what_would_fit():
    single = replace(LLAVA_7B, dtype="float32")
    with pytest.raises(ValueError) as error:
        fitting_batch(single, 24 * GIB, "NVIDIA A10G")
    message = str(error.value)
    needed = replace(single, batch_size=1).total / GIB
    assert f"NVIDIA A10G has 24.0 GiB free, and captioning one image at a time needs {needed:.1f} GiB" in message
    assert "weights 26.3 GiB in float32" in message
    batch = largest_batch(replace(LLAVA_7B, dtype="bfloat16"), 24 * GIB)
    assert f"caption.dtype=bfloat16 with caption.batch_size={batch}" in message
    with pytest.raises(ValueError, match=r"(?s)8\.0 GiB free.*fewer parameters") as error:
        fitting_batch(LLAVA_7B, 8 * GIB, "a small GPU")
    assert "bfloat16 with" not in str(error.value)


def test_a_batch_that_does_not_fit_is_made_smaller_aloud(capsys):
    batch = fitting_batch(LLAVA_7B, 40 * GIB, "NVIDIA A100")
    assert batch == largest_batch(LLAVA_7B, 40 * GIB)
    assert f"NVIDIA A100 holds a batch of {batch}, not 128" in capsys.readouterr().err
    assert fitting_batch(LLAVA_7B, 200 * GIB, "NVIDIA H200") == 128
    assert capsys.readouterr().err == ""


def test_the_need_is_read_from_the_models_configuration():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(),
        text_config=LlamaConfig(
            hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
        ),
    )
    assert need(config, LLAVA_7B.parameters, 780, "bfloat16", 128) == LLAVA_7B
