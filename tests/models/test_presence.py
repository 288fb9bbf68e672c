"""Weights are told to be whole or not from their headers."""

import os

import pytest

from vlcp_dist.models import presence
from vlcp_dist.models.tiny_llava import build_tiny_llava


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llava"
    build_tiny_llava(folder)
    return folder


def test_whole_weights_are_counted_and_cut_ones_named(llava):
    file = llava / "model.safetensors"
    content = file.read_bytes()
    assert presence.inspect(llava) == len(content)
    os.truncate(file, len(content) - 1)
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short or damaged"):
        presence.inspect(llava)
    file.write_bytes(content)


def test_parts_that_an_index_names_must_be_there(llava, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    )
    (tmp_path / "one.safetensors").write_bytes((llava / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"two\.safetensors is missing"):
        presence.inspect(tmp_path)


def test_a_diffusion_model_without_one_of_its_parts(llava, tmp_path):
    (tmp_path / "model_index.json").write_text('{"unet": [], "vae": []}')
    with pytest.raises(ValueError, match="has no text_encoder"):
        presence.inspect(tmp_path)


def test_what_was_never_downloaded(monkeypatch, tmp_path):
    assert presence.fetched("some/model-that-nobody-has", None) is None
