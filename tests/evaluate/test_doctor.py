"""The doctor counts, previews and warns of what was planted, and says what a template does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tamis.cli.command import plain
from tamis.cli.doctor import print_doctor
from tamis.errors import InvalidInput
from tamis.evaluate.doctor import DoctorResult, examine, examine_template
from tamis.settings import DoctorSettings
from tiny_run import CHATML, TinyRun, byte_tokenizer, chat, make_run, write_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


def examined(tiny: TinyRun, **settings: Any) -> DoctorResult:
    values: dict[str, Any] = {"model": str(tiny.model), "pool": str(tiny.pool), "target": str(tiny.target)}
    return examine(DoctorSettings(**{**values, **settings}))


def test_a_sound_run_is_previewed_counted_and_checked(tiny: TinyRun) -> None:
    result = examined(tiny, preview=2)
    assert (result.pool.rows, result.pool.sampled, result.pool.unsupervised_rows) == (60, 60, 0)
    assert result.pool.exact_copies == 2 and any("2 rows are exact copies" in w for w in result.warnings)
    assert result.target is not None and result.target.rows == 4
    assert len(result.pool.previews) == 2
    first = result.pool.previews[0]
    assert "".join(piece for piece, _ in first.pieces).startswith("<|im_start|>user\n")
    (answer,) = [piece for piece, supervised in first.pieces if supervised]
    row = json.loads(tiny.pool.read_text().splitlines()[first.row])
    assert answer.startswith(row["messages"][1]["content"] + "<|im_end|>")
    assert result.batch_check is not None and result.batch_check.passed
    assert result.sign_check is not None and result.sign_check.passed
    assert "lowers the target loss" in result.sign_convention
    assert result.coverage.covered < result.coverage.trainable
    assert {"dtype", "device", "attention"} <= set(result.model)


def test_the_projection_is_measured_from_the_shortest_rows_to_the_longest(tiny: TinyRun) -> None:
    result = examined(tiny)
    assert result.projection == {"name": "factorized", "algorithm": "factorized-v1", "dim": 16, "seed": 0}
    assert len(result.distortion) == 4
    assert [at.shortest for at in result.distortion] == sorted(at.shortest for at in result.distortion)
    assert all(at.pairs == 6 and 0 < at.rms_error < 0.3 for at in result.distortion)
    finer, coarse = (examined(tiny, projection="hadamard", projection_dim=dim) for dim in (4096, 4))
    assert max(at.rms_error for at in finer.distortion) < min(at.rms_error for at in coarse.distortion)
    assert any("raise --projection-dim" in warning for warning in coarse.warnings)
    assert not any("raise --projection-dim" in warning for warning in finer.warnings)
    console = Console(record=True, width=140)
    print_doctor(console, coarse)
    assert "projection: hadamard, dim 4" in console.export_text()
    none = examined(tiny, projection="none")
    assert none.projection is None and none.distortion == ()


def test_copies_are_not_measured_against_each_other(tiny: TinyRun, tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "p.jsonl", [chat("a", "b", id=f"row-{i}") for i in range(6)])
    result = examined(tiny, pool=str(pool), target=())
    assert result.distortion == ()
    assert any("needs two different rows with a gradient" in warning for warning in result.warnings)


def test_no_weights_are_needed_for_the_data_and_the_coverage(tiny: TinyRun) -> None:
    with_weights, without = examined(tiny), examined(tiny, numeric=False)
    assert without.batch_check is None and without.sign_check is None
    assert without.coverage == with_weights.coverage


def test_planted_trouble_is_warned_of(tiny: TinyRun, tmp_path: Path) -> None:
    target = [json.loads(line) for line in tiny.target.read_text().splitlines()]
    rows = [
        *(chat(f"Question {i}?", f"Answer {i}.", id=f"row-{i}") for i in range(6)),
        chat("x" * 300, "cut away", id="long"),
        {"messages": [{"role": "user", "content": "no answer"}], "id": "mute"},
        {**target[0], "id": "leak"},
    ]
    result = examined(tiny, pool=str(write_rows(tmp_path / "p.jsonl", rows)), max_length=128, numeric=False)
    said = "\n".join(result.warnings)
    assert "1 pool rows are target rows" in said and "leak" in said and "--drop-leaks" in said
    assert "longer than --max-length" in said
    assert "no supervised token" in said and "long" in said
    assert result.leaks is not None and result.leaks.exact == 1


def test_a_pool_of_one_usable_row_says_that_nothing_was_checked(tiny: TinyRun, tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "p.jsonl", [chat("a", "b")])
    result = examined(tiny, pool=str(pool), target=())
    assert result.batch_check is None and any("need two usable pool rows" in w for w in result.warnings)


def test_without_a_target_one_pool_row_stands_for_it(tiny: TinyRun) -> None:
    result = examined(tiny, target=())
    assert result.leaks is None and result.target is None
    assert result.sign_check is not None and result.sign_check.passed


def test_unusable_data_is_an_error(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none\.jsonl"):
        examined(tiny, pool=str(tmp_path / "none.jsonl"))


SYSTEM = "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
TRIMMED = CHATML.replace("message['content'] +", "(message['content'] | trim) +")
MARKED = CHATML.replace("{% for", "{% generation %}{% endgeneration %}{% for", 1)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, {"added_text": "", "trims_content": False, "takes_system": True, "has_generation_marks": False}),
        (SYSTEM + CHATML, {"added_text": "<|im_start|>system\nBe kind.<|im_end|>\n"}),
        (TRIMMED, {"trims_content": True}),
        (MARKED, {"has_generation_marks": True}),
        (NO_SYSTEM, {"takes_system": False}),
    ],
)
def test_what_a_template_does_is_found_with_probes(template: str, expected: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    tokenizer.chat_template = template
    found = plain(examine_template(tokenizer, given=False, notes=()))
    if expected.get("added_text"):
        # What both turns open with belongs to the turn, so the common end may be cut from the added text.
        assert expected["added_text"].startswith(found["added_text"][:20]) and "Be kind." in found["added_text"]
    else:
        assert {key: found[key] for key in expected} == expected


def test_a_tokenizer_without_a_template_gets_the_stated_default() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert examine_template(tokenizer, given=False, notes=("stated",)).origin == "default"


def test_the_printed_findings_mark_the_loss_and_escape_the_data(tiny: TinyRun, tmp_path: Path) -> None:
    rows = [chat("[bold]hi[/bold]", "\x1b[31mred\u202e", id="hostile"), chat("b", "c")]
    result = examined(tiny, pool=str(write_rows(tmp_path / "p.jsonl", rows)), numeric=False, preview=1)
    console = Console(record=True, width=100)
    with console.capture() as captured:
        print_doctor(console, result)
    text = captured.get()
    assert "[bold]hi[/bold]" in text
    assert "\x1b[31mred" not in text and "\u202e" not in text
    assert "⟦" in text and "⟧" in text
    assert "gradients cover" in text and "token embedding" in text


def test_the_result_is_plain_json(tiny: TinyRun) -> None:
    text = json.dumps(plain(examined(tiny, numeric=False)), allow_nan=False)
    assert json.loads(text)["pool"]["rows"] == 60
