"""Loading by folder, adapter folder and GGUF file; what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.model.load import ModelSettings, load_model, load_tokenizer, model_fingerprint, pad_token_id
from tamis.model.loss import per_sample_losses
from tamis.model.source import _hub_file
from tamis.model.targets import gradient_layers
from tiny_models import one_row, random_batch, tiny_model


def tiny_tokenizer(size: int = 60) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(size - 3))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a tokenizer."""
    place = tmp_path / "base"
    tiny_model("llama", dtype=torch.float32).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """An adapter folder on that model, without a tokenizer."""
    return save_adapter(load_model(ModelSettings(name=str(folder))).model, tmp_path / "adapter")


def save_adapter(base: nn.Module, place: Path, **config: Any) -> Path:
    torch.manual_seed(1)
    targets = config.pop("target_modules", ["q_proj", "v_proj"])
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **config))
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param)
    adapted.save_pretrained(place)
    return place


def settings(place: Path, **more: Any) -> ModelSettings:
    return ModelSettings(name=str(place), device="cpu", **more)


def test_folder_loads_with_all_weights_trainable(folder: Path) -> None:
    loaded = load_model(settings(folder))
    assert not loaded.model.training
    assert all(param.requires_grad for param in loaded.model.parameters())
    assert loaded.device == torch.device("cpu")
    batch = random_batch([5])
    expected = per_sample_losses(tiny_model("llama", dtype=torch.float32), batch)
    torch.testing.assert_close(per_sample_losses(loaded.model, batch), expected, rtol=1e-6, atol=0)
    total = sum(p.numel() for p in loaded.model.parameters())
    facts = {"class": "LlamaForCausalLM", "kind": "folder", "dtype": "float32", "device": "cpu", "parameters": total}
    assert {key: loaded.description[key] for key in facts} == facts
    assert loaded.description["fingerprint"] == loaded.fingerprint == model_fingerprint(settings(folder))


@pytest.mark.parametrize(
    ("name", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("float64", torch.float64)]
)
def test_dtype_is_as_asked_for_and_float32_on_a_cpu_by_default(folder: Path, name: str, dtype: torch.dtype) -> None:
    loaded = load_model(settings(folder, dtype=name))
    assert {param.dtype for param in loaded.model.parameters()} == {dtype}


def test_adapter_folder_loads_its_base_and_trains_its_factors_only(folder: Path, adapter: Path) -> None:
    loaded = load_model(settings(adapter))
    trainable = [name for name, param in loaded.model.named_parameters() if param.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert len(gradient_layers(loaded.model)) == len(trainable)
    assert loaded.description["kind"] == "adapter"
    assert loaded.description["base"] == str(folder)
    saved = load_file(adapter / "adapter_model.safetensors")
    inside = next(p for n, p in loaded.model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in n)
    torch.testing.assert_close(inside.data, saved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"])
    assert len(loaded.tokenizer) == 60  # the base's


def test_base_given_relative_to_the_adapter_folder_is_found(folder: Path, adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="../base")
    assert load_model(settings(adapter)).description["kind"] == "adapter"


def test_gradient_checkpointing_is_switched_on(folder: Path) -> None:
    loaded = load_model(settings(folder, gradient_checkpointing=True))
    assert any(getattr(module, "gradient_checkpointing", False) for module in loaded.model.modules())


def test_chat_template_is_text_or_a_file(folder: Path, tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert load_tokenizer(settings(folder, chat_template=text)).chat_template == text
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    assert load_tokenizer(settings(folder, chat_template=str(file))).chat_template == text
    with pytest.raises(InvalidInput, match=r"chat_template none\.jinja: neither a template .* nor a readable file"):
        load_tokenizer(settings(folder, chat_template="none.jinja"))


def test_pad_id_falls_back_to_end_of_sequence_then_zero() -> None:
    tokenizer = tiny_tokenizer()
    assert pad_token_id(tokenizer) == 2
    tokenizer.pad_token = "<pad>"
    assert pad_token_id(tokenizer) == 0
    bare = tiny_tokenizer()
    bare.eos_token = None
    assert pad_token_id(bare) == 0


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_weights_config_tokenizer_and_base_only(folder: Path, adapter: Path) -> None:
    plain, adapted = model_fingerprint(settings(folder)), model_fingerprint(settings(adapter))
    assert plain != adapted
    (folder / "README.md").write_text("notes")
    assert model_fingerprint(settings(folder)) == plain
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        assert model_fingerprint(settings(folder)) != plain, name
        assert model_fingerprint(settings(adapter)) != adapted, name
        (folder / name).write_bytes(before)
    assert model_fingerprint(settings(adapter)) == adapted
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert model_fingerprint(settings(adapter)) != adapted


def test_fingerprint_does_not_depend_on_where_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    before = model_fingerprint(settings(folder))
    folder.rename(tmp_path / "moved")
    assert model_fingerprint(settings(tmp_path / "moved")) == before


# --- what is refused --------------------------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"model '.*nowhere' does not exist; give a folder, a \.gguf file"):
        load_model(settings(tmp_path / "nowhere"))


def test_a_revision_of_what_lies_on_this_disk_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"revision='main': model '.*' is on this disk, and only the hub has rev"):
        load_tokenizer(ModelSettings(name=str(folder), revision="main"))


def test_hub_id_that_cannot_be_reached_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def unreachable(name: str, file: str, **_: object) -> str:
        calls.append(file)
        raise OSError("We couldn't connect to the hub.\nSee the documentation.")

    monkeypatch.setattr("tamis.model.source.cached_file", unreachable)
    monkeypatch.setattr("tamis.model.source._hub_answers", lambda name, revision: True)
    with pytest.raises(
        InvalidInput, match=r"model 'nobody/none' is neither .* \(We couldn't connect to the hub\.\); check"
    ):
        load_tokenizer(ModelSettings(name="nobody/none"))
    assert calls == ["config.json"]  # each attempt may wait half a minute for a network


def test_without_a_network_the_hub_is_asked_once_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def offline(self: object, name: str, *, revision: str | None, timeout: float) -> None:
        asked.append((name, timeout))
        raise ConnectionError("Name or service not known")

    def cached_only(name: str, file: str, *, local_files_only: bool, **_: object) -> None:
        assert local_files_only, "the file client would try five times"

    monkeypatch.setattr("tamis.model.source.HfApi.model_info", offline)
    monkeypatch.setattr("tamis.model.source.cached_file", cached_only)
    with pytest.raises(
        InvalidInput, match=r"model 'no-one/none' is no local folder.* and the hub cannot be reached; check"
    ):
        load_tokenizer(ModelSettings(name="no-one/none"))
    assert asked == [("no-one/none", 10.0)]


@pytest.mark.parametrize("name", ["here/model", "org/model.gguf", "model.safetensors", "./model", "/no/such/model"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tamis.model.source.HfApi.model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(
        InvalidInput, match=r"does not exist; give a folder, a \.gguf file or a hub id such as org/name"
    ):
        load_tokenizer(ModelSettings(name=name))


def test_hub_model_is_fingerprinted_by_its_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(commit: str) -> str:
        place = tmp_path / "hub" / "models--a--b" / "snapshots" / commit
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, place)

        def cached(name: str, file: str, **_: object) -> str | None:
            return str(place / file) if (place / file).exists() else None

        monkeypatch.setattr("tamis.model.source.cached_file", cached)
        monkeypatch.setattr("tamis.model.source._hub_answers", lambda name, revision: True)
        _hub_file.cache_clear()
        return model_fingerprint(ModelSettings(name="a/b"))

    first = snapshot("1" * 40)
    assert first == model_fingerprint(ModelSettings(name="a/b"))
    assert first != snapshot("2" * 40)
    _hub_file.cache_clear()


def test_other_files_and_empty_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InvalidInput, match=r"notes\.txt' is a file; give a folder, a hub id or a \.gguf file"):
        load_model(settings(tmp_path / "notes.txt"))
    with pytest.raises(InvalidInput, match=r"has no config\.json; save the model there with save_pretrained"):
        load_model(settings(tmp_path))
    (tmp_path / "model.Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(InvalidInput, match=r"holds GGUF files; give the file itself: .*model\.Q4\.gguf"):
        load_model(settings(tmp_path))


def test_broken_gguf_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf, one of the dev dependencies, is not installed")
    (tmp_path / "model.gguf").write_bytes(b"not a gguf file")
    with pytest.raises(InvalidInput, match=r"model '.*model\.gguf' cannot be (loaded|read)"):
        load_model(settings(tmp_path / "model.gguf"))


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("tamis.model.load.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"needs the gguf package: pip install 'tamis\[gguf\]'"):
        load_model(settings(tmp_path / "model.gguf"))


def test_missing_and_broken_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"lacks 1 of its weights \(first: model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_model(settings(folder))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InvalidInput, match=r"model '.*base' cannot be"):
        load_model(settings(folder))
    file.unlink()
    with pytest.raises(InvalidInput, match=r"model '.*base' cannot be read"):
        load_model(settings(folder))


def test_unknown_architecture_and_broken_config_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="telepathy", architectures=["Telepath"])
    with pytest.raises(InvalidInput, match=r"model '.*base' cannot be loaded"):
        load_model(settings(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"model '.*base' cannot be"):
        load_model(settings(folder))


def test_missing_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InvalidInput, match=r"tokenizer '.*base' cannot be"):
        load_tokenizer(settings(folder))


def test_padding_has_an_embedding_even_if_the_tokenizer_knows_more_ids_than_the_model(folder: Path) -> None:
    tokenizer = tiny_tokenizer(size=70)
    tokenizer.pad_token = "w66"  # id 69, and the embedding has 64 rows
    tokenizer.save_pretrained(folder)
    loaded = load_model(settings(folder))
    assert pad_token_id(loaded.tokenizer) == 69 and loaded.pad_id == 0


def test_adapter_of_another_shape_is_refused(folder: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = {name: torch.zeros(weight.shape[0] + 1, weight.shape[1]) for name, weight in load_file(file).items()}
    save_file(weights, file)
    with pytest.raises(InvalidInput, match=r"adapter '.*' does not fit its base '.*base'"):
        load_model(settings(adapter))


def test_adapter_of_a_model_with_other_layers_is_refused(folder: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "layers.1" not in name}, file)
    with pytest.raises(InvalidInput, match=r"does not fit its base '.*': 4 weights are on one side only"):
        load_model(settings(adapter))
    edit_json(adapter / "adapter_config.json", target_modules=["c_attn"])
    with pytest.raises(InvalidInput, match="does not fit its base"):
        load_model(settings(adapter))


def test_adapter_without_a_base_or_of_another_kind_is_refused(adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/nowhere/at/all")
    with pytest.raises(InvalidInput, match=r"adapter '.*' names a base that cannot be read: model '/nowhere/at/all'"):
        load_model(settings(adapter))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InvalidInput, match="names no base: set base_model_name_or_path"):
        load_model(settings(adapter))
    edit_json(adapter / "adapter_config.json", peft_type="IA3")
    with pytest.raises(Unsupported, match="is of type 'IA3'; only LORA adapters are supported"):
        load_model(settings(adapter))


def test_settings_are_checked() -> None:
    with pytest.raises(InvalidSettings, match=r"model is empty"):
        ModelSettings(name="")
    with pytest.raises(InvalidSettings, match="dtype 'int4' is unknown; choose auto or one of float32"):
        ModelSettings(name="x", dtype="int4")
    with pytest.raises(InvalidSettings, match="device 'cpu' and device_map 'auto' exclude each other"):
        ModelSettings(name="x", device="cpu", device_map="auto")


def test_unavailable_device_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidSettings, match="device 'toaster' is not available"):
        load_model(ModelSettings(name=str(folder), device="toaster"))
    if not torch.cuda.is_available():
        with pytest.raises(InvalidSettings, match="device 'cuda' is not available"):
            load_model(ModelSettings(name=str(folder), device="cuda"))


def test_device_map_loads_through_accelerate(folder: Path) -> None:
    loaded = load_model(ModelSettings(name=str(folder), device_map="cpu"))
    assert loaded.description["device"] == "device_map cpu"
    batch = one_row(random_batch([5]), 0)
    assert torch.isfinite(per_sample_losses(loaded.model, batch)).all()
