"""Rows that the model predicts with certainty have no gradient: they are listed, never selected, never NaN."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tamis
from tamis.errors import InvalidInput
from tiny_run import TinyRun, byte_tokenizer, make_run, write_rows

CERTAIN = [{"id": f"certain-{i}", "prompt": "Z" * i, "completion": "Y"} for i in (1, 2)]  # and then the row's end
CERTAIN_ROWS = (60, 61)  # after the rows of the tiny run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny run with an untied model that is certain of Y after Z, and of the end after Y, and of nothing else."""
    folder = tmp_path_factory.mktemp("run")
    tiny = make_run(folder)
    tokenizer = byte_tokenizer()
    config = LlamaConfig.from_pretrained(tiny.model)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    z, y = (tokenizer.convert_tokens_to_ids(letter) for letter in "ZY")
    with torch.no_grad():
        # Axes 0 and 1 of the residual stream belong to Z and Y: no other token has them, no block writes to them.
        model.model.embed_tokens.weight[:, :2] = 0
        model.model.embed_tokens.weight[z, 0] = model.model.embed_tokens.weight[y, 1] = 100.0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[:2] = 0
            block.mlp.down_proj.weight[:2] = 0
        model.lm_head.weight[:, :2] = 0
        model.lm_head.weight[y, 0] = model.lm_head.weight[tokenizer.eos_token_id, 1] = 1000.0
    model.save_pretrained(folder / "certain")
    tokenizer.save_pretrained(folder / "certain")
    return replace(tiny, model=folder / "certain")


@pytest.fixture(scope="module")
def certain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "certain.jsonl", CERTAIN)


def select(run: TinyRun, out: Path, **settings: object) -> tamis.Selection:
    values: dict[str, object] = {"model": run.model, "pool": run.pool, "target": run.target, "budget": "100%"}
    return tamis.select(**{**values, "out": out, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"projection": "none"},
        {"projection": "mask", "projection_dim": 500},
        {"set": {"normalize": "dot"}},
        {"aggregate": "mean"},
        {"method": "less", "set": {"warmup_epochs": 1, "warmup_pool_share": 0.3}},
    ],
    ids=["tracin", "exact", "mask", "dot", "mean", "less"],
)
def test_a_pool_row_without_gradient_is_listed_and_never_selected(
    run: TinyRun, certain: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    selection = select(run, tmp_path / "out", pool=[run.pool, certain], **settings)
    table = selection.table.to_pydict()
    assert [table["loss"][row] for row in CERTAIN_ROWS] == [0.0, 0.0]
    assert np.isfinite(np.array(table["score"], dtype=float)).all()
    assert not any(table["selected"][row] for row in CERTAIN_ROWS)
    others = set(range(60)) - {copy for _, copy in run.copies}
    assert set(selection.order.tolist()) == others, "the whole pool was asked for"
    (note,) = [note for note in selection.manifest["notes"] if "gradient of exactly zero" in note]
    assert "2 pool rows" in note and "certain-1" in note and "certain-2" in note
    written = (tmp_path / "out" / "selected.jsonl").read_text()
    assert '"certain-' not in written
    assert "gradient of exactly zero" in (tmp_path / "out" / "report.html").read_text()


def test_a_target_row_without_gradient_is_left_out_and_changes_no_score(
    run: TinyRun, certain: Path, tmp_path: Path
) -> None:
    (tmp_path / "target").mkdir()
    for file in (run.target, certain):
        shutil.copy(file, tmp_path / "target")
    with_it = select(run, tmp_path / "a", target=f"sums={tmp_path / 'target' / '*.jsonl'}")
    without = select(run, tmp_path / "b", target=f"sums={run.target}")
    assert any("2 target rows" in warning and "certain-1" in warning for warning in with_it.warnings)
    scores = [np.array(selection.table["score"].to_pylist(), dtype=float) for selection in (with_it, without)]
    assert np.isfinite(scores[0]).all()
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-4)  # features are stored in float16
    assert with_it.order.tolist() == without.order.tolist()


def test_a_target_whose_rows_all_lack_a_gradient_is_refused(run: TinyRun, certain: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no row of target 'certain' has a gradient: .* give other target rows"):
        select(run, tmp_path / "out", target=[f"sums={run.target}", str(certain)])


def test_a_pool_whose_rows_all_lack_a_gradient_is_refused(run: TinyRun, certain: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none of the 2 scored pool rows has a gradient: .* other pool rows"):
        select(run, tmp_path / "out", pool=certain, budget=2)
