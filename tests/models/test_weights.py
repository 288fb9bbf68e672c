"""Finding weights without loading them."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from vlcp_dist.models.weights import count_parameters, find_weights


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros((), dtype=torch.float16)}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_single_file(folder):
    found = find_weights(folder, None, default="owner/name")
    assert found == [folder / "model.safetensors"]
    assert count_parameters(found[0]) == 16


def test_shards_are_those_that_the_index_names(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"no two\.safetensors in"):
        find_weights(folder, None, default="owner/name")
    (folder / "two.safetensors").touch()
    assert find_weights(folder, None, default="owner/name") == [folder / f"{n}.safetensors" for n in ("one", "two")]
    with pytest.raises(ValueError, match=r"two\.safetensors is no safetensors file"):
        count_parameters(folder / "two.safetensors")
    whole = folder / "one.safetensors"
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"one\.safetensors is cut short or damaged"):
        count_parameters(whole)


def test_the_parts_of_a_pipeline(folder):
    with pytest.raises(FileNotFoundError) as error:
        find_weights(str(folder), "1a2b", parts=("unet", "vae"), default="owner/name", files=("unet/config.json",))
    assert str(error.value).startswith(f"cannot load {folder}: no unet/config.json in {folder}")
    command = f"hf download owner/name unet/config.json --revision 1a2b --local-dir {folder}"
    assert str(error.value).endswith(command)
    for part in ("unet", "vae"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
        save_file({"a": torch.zeros(2)}, folder / part / "diffusion_pytorch_model.safetensors")
    assert len(find_weights(folder, None, parts=("unet", "vae"), default="owner/name")) == 2


def test_the_hubs_cache(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    with pytest.raises(FileNotFoundError) as error:
        find_weights("some/model", "v1", default="owner/name")
    assert str(cache) in str(error.value)
    assert str(error.value).endswith("hf download some/model --revision v1")
    stored = cache / "models--some--model"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "v1").write_text("abc")
    snapshot = stored / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    assert find_weights("some/model", "v1", default="owner/name") == [snapshot / "model.safetensors"]
    with pytest.raises(FileNotFoundError):  # another revision is another model
        find_weights("some/model", None, default="owner/name")
