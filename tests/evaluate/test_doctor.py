"""The doctor counts, previews and warns of what was planted, and says what a template does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import tamis
from tamis.cli.doctor import print_doctor
from tamis.cli.main import run as run_command
from tamis.cli.output import plain
from tamis.errors import InvalidInput
from tamis.evaluate.checks import SignCheck, check_sign
from tamis.evaluate.doctor import DoctorResult, examine
from tamis.evaluate.template import examine_template
from tamis.model.targets import Coverage, CoverageRow
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


def test_a_target_file_that_nothing_can_be_learnt_from_fails_and_no_other_row_stands_for_it(
    tiny: TinyRun, tmp_path: Path
) -> None:
    long = write_rows(tmp_path / "long.jsonl", [chat("a " * 400, "b") for _ in range(3)])
    alone = examined(tiny, target=str(long), max_length=64)
    assert not alone.passed and alone.sign_check is None
    assert any(f"none of the 3 rows looked at of {long}" in failure for failure in alone.failures)
    assert any("sign was not checked" in warning for warning in alone.warnings)
    beside = examined(tiny, target=(str(tiny.target), str(long)), max_length=64)
    assert not beside.passed and beside.sign_check is not None
    assert len(beside.failures) == 1 and "raise --max-length" in beside.failures[0]


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


def doctor_of(
    tiny: TinyRun, capfd: pytest.CaptureFixture[str], model: Path, *flags: str
) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and printed lines of the command."""
    words = ["doctor", "--model", str(model), "--pool", str(tiny.pool), "--target", str(tiny.target), *flags]
    code = run_command([*words, "--json"])
    found = json.loads(capfd.readouterr().out)
    assert run_command(words) == code
    printed = capfd.readouterr()
    return code, found, printed.out + printed.err


def test_a_sound_model_passes_with_exit_code_zero(tiny: TinyRun, capfd: pytest.CaptureFixture[str]) -> None:
    for flags in ((), ("--no-numeric",)):
        code, found, _ = doctor_of(tiny, capfd, tiny.model, *flags)
        assert code == 0 and found["passed"] is True and found["failures"] == []


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "Every gradient of the checked rows is zero"), (float("nan"), "numeric checks stopped")]
)
def test_weights_that_are_no_model_fail_a_check_and_the_exit_code(
    value: float, said: str, tiny: TinyRun, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    code, found, printed = doctor_of(tiny, capfd, tmp_path / "model")
    assert code == 1 and found["passed"] is False
    assert [said in sentence for sentence in found["failures"]] == [True]
    assert set(found["failures"]) <= set(found["warnings"]) and said in printed
    assert ("sign" in printed and "FAILED" in printed) or value != 0


@pytest.mark.parametrize("is_routed", [False, True])
def test_a_wrong_sign_fails_unless_routes_may_explain_it(
    is_routed: bool, tiny: TinyRun, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def contrary(*args: Any, **settings: Any) -> SignCheck:
        found = check_sign(*args, **settings)
        assert found is not None
        return replace(found, measured_change=-found.predicted_change, steps=3, is_routed=is_routed)

    monkeypatch.setattr("tamis.evaluate.numbers.check_sign", contrary)
    code, found, printed = doctor_of(tiny, capfd, tiny.model)
    assert (code, found["passed"]) == ((0, True) if is_routed else (1, False))
    assert ("not differentiable" in printed) is is_routed and ("undecided" in printed) is is_routed
    assert ("do not trust" in printed) is not is_routed and "the smallest of 3 steps" in printed


def test_reasoning_that_the_template_drops_is_counted(tiny: TinyRun, tmp_path: Path) -> None:
    rows = [chat(f"q {i}", f"a {i}") for i in range(6)]
    for row in rows[:2]:
        row["messages"][1]["reasoning_content"] = "let me see"
    pool = str(write_rows(tmp_path / "p.jsonl", rows))
    result = examined(tiny, pool=pool, numeric=False)
    assert result.pool.dropped_rows == 2 and result.target is not None and result.target.dropped_rows == 0
    said = [w for w in result.warnings if "leaves out a part of an assistant turn" in w]
    assert len(said) == 1 and said[0].startswith("pool: in 2 of 6 rows")
    for _ in range(2):  # the second run reads its tokens from the store
        selection = tamis.select(
            model=tiny.model, pool=pool, target=tiny.target, budget=2, out=tmp_path / "out", method="bm25"
        )
        assert f"About the run. {said[0]}" in selection.manifest["warnings"]


def test_repeated_ids_are_told_once(tiny: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pool = write_rows(tmp_path / "p.jsonl", [chat(f"q {i}", f"a {i}", id="same") for i in range(6)])
    again = replace(tiny, pool=pool)
    _, _, printed = doctor_of(again, capfd, tiny.model, "--no-numeric")
    assert printed.count("ids occur more than once") == 1


def test_the_result_is_plain_json(tiny: TinyRun) -> None:
    text = json.dumps(plain(examined(tiny, numeric=False)), allow_nan=False)
    assert json.loads(text)["pool"]["rows"] == 60


def test_parameter_names_are_never_torn_inside_a_part_at_eighty_columns(tiny: TinyRun) -> None:
    name = "model.language_model.layers.*.post_attention_layernorm.weight"
    rows = (
        CoverageRow(parameters=name, tensors=2, numel=1_234_567_890, share=0.5, covered=False, reason="norm or bias"),
        CoverageRow(parameters="lm_head.weight", tensors=1, numel=7, share=0.5, covered=True, reason="linear layer"),
    )
    result = replace(examined(tiny, numeric=False), coverage=Coverage(rows=rows, trainable=10, covered=5))
    console = Console(record=True, width=80)
    with console.capture() as captured:
        print_doctor(console, result)
    said = captured.get()
    for whole in ("model.language_model.layers.*.", "post_attention_layernorm ×2", "1,234,567,890", "lm_head", "50.0%"):
        assert whole in said
