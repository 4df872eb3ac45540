"""What a proxy must not do: load to other numbers, lose its folder to a full disk, or end in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

import proxy_case
import tamis
from proxy_case import SETTINGS, UNALIGNED
from tamis.disk import disk_errors
from tamis.errors import BadRow, InvalidInput, InvalidSettings, Unsupported
from tamis.model.load import ModelSettings, load_model
from tamis.model.loss import per_sample_losses
from tamis.model.low_rank_linear import put_low_rank_layers
from tamis.model.proxy_folder import ProxyLayout, proxy_class
from tamis.proxies.assemble import copy_with, proxy_of, write_folder
from tamis.proxies.bench import Bench
from tamis.proxies.compressible import find_compressible
from tamis.proxies.decompose import decompose
from tamis.proxies.rows import batches_of
from tamis.runs.proxy import prepare, read_rows
from tamis.settings import ProxySettings
from tamis.settings.proxy import Recipe
from tamis.training.lora import add_lora
from tiny_models import random_batch, tiny_model
from tiny_run import TinyRun, byte_tokenizer, chat, make_run, save_model, write_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), rows=120)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(run: TinyRun, out: Path, *, base: dict[str, Any], **changes: Any) -> tamis.ProxyResult:
    return tamis.proxy(**{"model": run.model, "pool": run.pool, "target": run.target, "out": out, **base, **changes})


def factored(model: nn.Module, name: str) -> tuple[nn.Module, ProxyLayout]:
    """``model`` with the layer ``name`` cut to rank 4."""
    u, s, v = torch.linalg.svd(model.get_submodule(name).weight.detach(), full_matrices=False)  # type: ignore[operator]
    return proxy_of(model, {name: ((u * s)[:, :4], v[:4])}, space="product"), ProxyLayout(ranks={name: 4})


# --- the folder loads


def test_a_class_that_cannot_read_what_was_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers.conversion_mapping", reason="Transformers 4 renames no weights")

    def named_by_us(*args: Any) -> type[Any]:
        made = proxy_class(*args)
        made.__name__, made.__module__ = f"{made.__name__}Proxy", "tamis.model.proxy_folder"
        return made

    proxy, layout = factored(proxy_case.model("gpt_neox"), "gpt_neox.layers.0.mlp.dense_h_to_4h")
    write_folder(proxy, byte_tokenizer(), layout, tmp_path / "proxy")
    monkeypatch.setattr("tamis.model.load.proxy_class", named_by_us)
    with pytest.raises(Unsupported, match=r"the proxy of GPTNeoXForCausalLM is written, .*lm_head\.weight.*delete .*"):
        write_folder(proxy, byte_tokenizer(), layout, tmp_path / "again")


def test_a_layout_of_other_ranks_than_the_weights_is_refused_at_once(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    proxy, _ = factored(proxy_case.model(), name)
    with pytest.raises(Unsupported, match=r"is written, but the installed Transformers cannot load it again"):
        write_folder(proxy, byte_tokenizer(), ProxyLayout(ranks={name: 5}), tmp_path / "proxy")


def test_trying_a_folder_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PreTrainedModel] = []
    original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def watched(cls: type[Any], *args: Any, **options: Any) -> Any:
        found = original(cls, *args, **options)
        seen.append(found[0])
        return found

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    proxy, layout = factored(proxy_case.model(), "model.layers.0.mlp.up_proj")
    write_folder(proxy, byte_tokenizer(), layout, tmp_path / "proxy")
    assert [{param.device.type for param in model.parameters()} for model in seen] == [{"meta"}]


# --- adapters of tied models


def saved_adapter(run: TinyRun, folder: Path, **options: Any) -> Path:
    base = load_model(ModelSettings(name=str(run.model), device="cpu")).model
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                param.add_(torch.randn(param.shape, generator=draw) * 0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(run.model)
    adapted.save_pretrained(folder)
    return folder


def merged(run: TinyRun, adapter: Path) -> nn.Module:
    settings = ProxySettings(model=str(adapter), pool=(str(run.pool),), target=(str(run.target),), out="-", **UNALIGNED)
    return prepare(settings, *read_rows(settings))[0].model


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of the tied layer
def test_lora_on_one_use_of_a_tied_matrix_is_not_merged(run: TinyRun, tmp_path: Path, layer: str) -> None:
    adapter = saved_adapter(run, tmp_path / "adapter", target_modules=["q_proj", layer])
    with pytest.raises(Unsupported, match=rf"has LoRA on '(model\.)?{layer}'.*would change both; train the adapter"):
        merged(run, adapter)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"use_dora": True},
        {"trainable_token_indices": [5, 70]},
    ],
    ids=["plain", "own head", "own embedding", "dora", "own tokens"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_merge_soundly_keep_their_losses_to_the_folder(
    run: TinyRun, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapter = saved_adapter(run, tmp_path / "adapter", target_modules=["q_proj"], **options)
    batch = random_batch([9, 12], vocab=200)
    whole = merged(run, adapter)
    write_folder(whole, byte_tokenizer(), ProxyLayout(ranks={}), tmp_path / "folder")
    with torch.no_grad():
        wanted = per_sample_losses(load_model(ModelSettings(name=str(adapter), device="cpu")).model, batch)
        torch.testing.assert_close(per_sample_losses(whole, batch), wanted)
        again = load_model(ModelSettings(name=str(tmp_path / "folder"), device="cpu")).model
        torch.testing.assert_close(per_sample_losses(again, batch), wanted)


# --- siblings with fewer positions


def save_gpt2(folder: Path, positions: int) -> Path:
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=4, n_positions=positions)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SCORER: dict[str, Any] = {
    "preset": "influence-scorer", "held_out_rows": 20, "device": "cpu", "projection_dim": 8, "steps": 10,
    "update_rows": 2,
}  # fmt: skip
SIBLING: dict[str, Any] = {"preset": "sibling", "held_out_rows": 20, "device": "cpu", "projection_dim": 8}


def test_rows_that_a_sibling_has_no_positions_for_are_refused(run: TinyRun, tmp_path: Path) -> None:
    sibling = save_gpt2(tmp_path / "small", 48)
    with pytest.raises(BadRow, match=r"tokens, but '.*small' has a table of 48 positions .* --max-length 48"):
        build(run, tmp_path / "proxy", base=SIBLING, sibling=sibling)


def test_a_scorer_is_refused_for_a_pool_row_that_was_not_drawn_before_anything_is_computed(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in run.pool.read_text().splitlines()]
    pool = write_rows(tmp_path / "pool.jsonl", [*rows, chat("Hi " * 40, "yes " * 20, id="long")])
    sibling = save_gpt2(tmp_path / "small", 120)
    monkeypatch.setattr(Bench, "annotate", lambda *_: pytest.fail("rows were scored"))
    with pytest.raises(BadRow, match=r"pool\.jsonl, row 120 .*'.*small' has a table of 120 positions .*longer: 1\)"):
        build(run, tmp_path / "proxy", base=SCORER, pool=pool, sibling=sibling)


def test_rows_beyond_what_a_sibling_was_made_for_are_warned_of(run: TinyRun, tmp_path: Path) -> None:
    sibling = save_model(tmp_path / "small", seed=3, hidden=16)
    config = json.loads((sibling / "config.json").read_text())
    (sibling / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    built = build(run, tmp_path / "proxy", base=SIBLING, sibling=sibling)
    assert any("longer than the 48 positions" in sentence and "small" in sentence for sentence in built.warnings)


# --- the disk


def test_a_build_that_a_full_disk_stopped_in_its_last_step_goes_on(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: PreTrainedModel, folder: Path, **_: Any) -> None:
        model.config.save_pretrained(folder)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(InvalidInput, match="run the same command again; everything written before is kept"):
            build(run, tmp_path / "proxy", base=SETTINGS)
    assert (tmp_path / "proxy" / "config.json").exists()
    monkeypatch.setattr("tamis.proxies.decompose.factor_layer", lambda *_, **__: pytest.fail("found again"))
    build(run, tmp_path / "proxy", base=SETTINGS)
    load_model(ModelSettings(name=str(tmp_path / "proxy"), device="cpu"))


def test_a_scorer_that_a_full_disk_stopped_between_its_files_goes_on(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        with disk_errors(tmp_path):
            raise OSError(28, "No space left on device")

    sibling = save_model(tmp_path / "small", seed=3, hidden=16)
    with monkeypatch.context() as patch:
        patch.setattr("tamis.proxies.baselines._write_scores", full)
        with pytest.raises(InvalidInput, match="No space left on device"):
            build(run, tmp_path / "proxy", base=SCORER, sibling=sibling)
    build(run, tmp_path / "proxy", base=SCORER, sibling=sibling)
    assert (tmp_path / "proxy" / "scores.parquet").exists()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_do_not_fit_on_the_disk_are_one_line(tmp_path: Path) -> None:
    proxy, layout = factored(proxy_case.model(), "model.layers.0.mlp.up_proj")
    with (
        pytest.raises(InvalidInput, match=rf"cannot write {tmp_path / 'proxy'}: File too large; .*the same command"),
        files_up_to(8192),
    ):
        write_folder(proxy, byte_tokenizer(), layout, tmp_path / "proxy")


@pytest.mark.parametrize(
    "said",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    ],
)
def test_errors_of_the_disk_are_known_in_every_spelling_of_safetensors(tmp_path: Path, said: str) -> None:
    with pytest.raises(InvalidInput, match="No space left on device; free some space"), disk_errors(tmp_path):
        raise SafetensorError(said)
    with pytest.raises(InvalidInput, match="another run may be working"), disk_errors(tmp_path):
        save_file({"a": torch.ones(1)}, tmp_path / "nowhere" / "file")


def test_what_safetensors_refuses_for_another_reason_is_no_matter_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="header too small"), disk_errors(tmp_path):
        raise SafetensorError("Error while deserializing: header too small")


# --- LoRA by name


def test_a_layer_in_factors_takes_lora_on_both_and_a_whole_one_of_its_name_as_it_is() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    put_low_rank_layers(model, {"model.layers.0.self_attn.q_proj": 4}, space="product")
    adapted = add_lora(model, rank=2, alpha=4, seed=0, targets=("q_proj", "v_proj"))
    found = {
        name.removeprefix("base_model.model.model.layers.").removesuffix(".lora_A.default.weight")
        for name, param in adapted.named_parameters()
        if param.requires_grad and ".lora_A." in name
    }
    attention = [f"{block}.self_attn." for block in (0, 1)]
    assert found == {
        f"{attention[0]}q_proj.A", f"{attention[0]}q_proj.B", f"{attention[1]}q_proj",
        f"{attention[0]}v_proj", f"{attention[1]}v_proj",
    }  # fmt: skip


@pytest.mark.parametrize(("target", "kind"), [("self_attn", "LlamaAttention"), ("embed_tokens", "Embedding")])
def test_a_name_of_no_linear_layer_is_refused_for_lora(target: str, kind: str) -> None:
    with pytest.raises(InvalidSettings, match=rf"got '{target}', which is 'model\..*{target}', a {kind} .*q_proj"):
        add_lora(tiny_model("llama"), rank=2, alpha=4, seed=0, targets=("q_proj", target))


# --- copies and resumed builds


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RecurrentGemmaConfig(
        **sizes, vocab_size=64, lru_width=16, attention_window_size=16, head_dim=4,
        block_types=["recurrent", "attention"],
    )  # fmt: skip
    return RecurrentGemmaForCausalLM(config).eval()


def stateful() -> nn.Module:
    model = tiny_model("llama", dtype=torch.float32)
    model.last_states = model.get_input_embeddings().weight * 2  # type: ignore[operator]
    return model


@pytest.mark.parametrize("made", [recurrent, stateful])
def test_a_model_that_keeps_states_of_its_last_pass_is_copied_without_their_graph(
    made: Callable[[], nn.Module],
) -> None:
    model, batch = made(), random_batch([6, 9])
    per_sample_losses(model, batch).sum().backward()
    copied = copy_with(model, {})
    kept = [value for module in copied.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert kept and all(value.grad_fn is None for value in kept)
    with torch.no_grad():
        torch.testing.assert_close(per_sample_losses(copied, batch), per_sample_losses(model, batch))
    assert {id(param) for param in copied.parameters()} == {id(param) for param in model.parameters()}


def test_a_model_with_a_state_that_cannot_be_copied_is_refused() -> None:
    model = stateful()
    model.all_states = [model.get_input_embeddings().weight * 3]  # type: ignore[operator, assignment]
    with pytest.raises(Unsupported, match="LlamaForCausalLM cannot be copied, and a proxy is made as a copy"):
        copy_with(model, {})


def test_a_build_killed_between_its_only_layer_and_that_layers_seconds_goes_on(tmp_path: Path) -> None:
    model = proxy_case.model()
    batches = batches_of(proxy_case.roles().probe, batch_tokens=64, pad_id=0)
    layers = find_compressible(model, batches[-1]).layers[:1]

    def found() -> float:
        return decompose(
            model, layers, batches, recipe=Recipe(), lowest_sparsity=0.5, tokens_per_row=9, probe_gb=4.0, seed=0,
            folder=tmp_path, advance=lambda layers: None,
        ).seconds  # fmt: skip

    assert found() > 0
    (tmp_path / "seconds.txt").unlink()
    assert found() == 0
