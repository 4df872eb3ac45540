"""Rows that the model cannot take are named before it stumbles; what it merely was not made for is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tamis
from tamis.errors import BadRow
from tamis.evaluate.doctor import examine
from tamis.evaluate.plan import estimate_plan
from tamis.settings import DoctorSettings, PlanSettings
from tiny_run import TinyRun, byte_tokenizer, chat, make_run, write_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Ten rows; row 4 is longer than 100 tokens (one a byte) and row 7 longest."""
    rows = [chat(f"question {i}", f"answer {i}" + {4: "." * 80, 7: "." * 500}.get(i, "")) for i in range(10)]
    return write_rows(tmp_path / "long.jsonl", rows)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A model with learned embeddings of 100 positions."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=100, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def selected(out: Path, **settings: Any) -> list[str]:
    warnings: list[str] = tamis.select(budget=2, out=out, report=False, **settings).manifest["warnings"]
    return warnings


def examined(out: Path, **settings: Any) -> list[str]:
    return list(examine(DoctorSettings(**{name: str(value) for name, value in settings.items()})).warnings)


def planned(out: Path, **settings: Any) -> list[str]:
    return list(estimate_plan(PlanSettings(**{name: str(value) for name, value in settings.items()})).notes)


VERBS = pytest.mark.parametrize("verb", [selected, examined, planned])


@VERBS
def test_rows_beyond_learned_positions_are_refused_by_the_longest(
    verb: Callable[..., list[str]], gpt2: Path, pool: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    problem = r"long\.jsonl, row 7 .*has \d+ tokens, .* table of 100 positions .* longer: 2\); .* --max-length 100"
    with pytest.raises(BadRow, match=problem):
        verb(tmp_path / "out", model=gpt2, pool=pool, target=tiny.target)


def test_cut_to_the_positions_they_are_scored(gpt2: Path, pool: Path, tiny: TinyRun, tmp_path: Path) -> None:
    notes = selected(tmp_path / "out", model=gpt2, pool=pool, target=tiny.target, max_length=100)
    assert not any("positions" in note for note in notes)


@VERBS
def test_rows_beyond_rotary_positions_are_counted(
    verb: Callable[..., list[str]], pool: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    said = [s for s in verb(tmp_path / "out", model=tiny.model, pool=pool, target=tiny.target) if "positions" in s]
    assert len(said) == 1
    assert re.search(r"pool: 1 of 10 rows are longer than the 512 positions .* --max-length 512 cuts them", said[0])


@pytest.fixture
def one_id_more(tiny: TinyRun, tmp_path: Path) -> Path:
    """A model folder whose tokenizer has a token, and the padding with it, that the embedding has no row for."""
    place = tmp_path / "model"
    place.mkdir()
    for file in tiny.model.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<image>"})
    assert tokenizer.pad_token_id == json.loads((place / "config.json").read_text())["vocab_size"]
    tokenizer.save_pretrained(place)
    return place


def test_ids_without_an_embedding_do_no_harm_if_no_row_has_them(
    one_id_more: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    data = {"pool": tiny.pool, "target": tiny.target, "budget": 5, "report": False}
    for name, model in (("plain", tiny.model), ("more", one_id_more)):
        tamis.select(model=model, out=tmp_path / name, **data)  # type: ignore[arg-type]
    chosen = [(tmp_path / name / "selected.jsonl").read_text() for name in ("plain", "more")]
    assert chosen[0] == chosen[1]


@VERBS
def test_a_row_with_an_id_without_an_embedding_is_named(
    verb: Callable[..., list[str]], one_id_more: Path, tiny: TinyRun, tmp_path: Path
) -> None:
    rows = [chat(f"question {i}", "an <image>" if i == 3 else f"answer {i}") for i in range(6)]
    pool = write_rows(tmp_path / "images.jsonl", rows)
    with pytest.raises(BadRow, match=r"images\.jsonl, row 3 .*token '<image>' \(id \d+\), but the embedding .* rows"):
        verb(tmp_path / "out", model=one_id_more, pool=pool, target=tiny.target)
