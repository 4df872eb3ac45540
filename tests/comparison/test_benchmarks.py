"""Tasks of lm-evaluation-harness: refused before any work without the package, and answered by the model that is given.

The tests with the harness itself run where it is installed (the extra ``eval``); it is no part of the test environment.
"""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tamis
from comparison_runs import contender, made_run
from tamis.comparison import benchmarks
from tamis.comparison.benchmarks import Benchmarks, _metrics, open_benchmarks
from tamis.comparison.records import Records
from tamis.comparison.verdict import standings_of
from tamis.errors import InvalidInput, InvalidSettings, Unsupported
from tamis.model.load import ModelSettings, load_model
from tiny_run import make_run

harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-evaluation-harness (the extra eval)")

QUESTIONS = [
    ("the sky is", ["blue", "green"], 0),
    ("grass is", ["red", "green"], 1),
    ("snow is", ["white", "black"], 0),
]
TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def make_task(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "colours.yaml").write_text(TASK.format(file=folder / "questions.jsonl"), encoding="utf-8")
    return folder


def test_without_the_package_a_comparison_says_so_before_it_reads_or_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    monkeypatch.setattr("tamis.runs.compare.model_fingerprint", lambda settings: pytest.fail("the model was read"))
    run = make_run(tmp_path / "run", rows=20)
    with pytest.raises(Unsupported, match=r"pip install 'tamis\[eval\]'"):
        tamis.compare(
            model=run.model, pool=run.pool, target=run.target, eval=run.target, tasks=["gsm8k"], out=tmp_path / "out"
        )
    assert not (tmp_path / "out" / "records").exists()


def test_no_task_asks_for_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: pytest.fail("the package was looked for"))
    assert open_benchmarks((), folder=None, limit=None, shots=None) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task_limit": 3}, "no task is asked for"),
        ({"tasks": ("mmlu",), "task_limit": 0}, "task_limit=0"),
        ({"tasks": ("mmlu",), "task_shots": -1}, "task_shots=-1"),
        ({"tasks": ("mmlu",), "planted": True}, "planted"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        tamis.CompareSettings(**{"model": "m", "pool": ("p",), "target": ("t",), "eval": ("e",), **given})


def test_a_group_stands_for_its_tasks_and_errors_of_metrics_are_left_out() -> None:
    found = {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "mmlu_law": {"alias": " - law", "acc,none": 0.25},
            "gsm8k": {"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": 0.1, "sample_len": 8},
        },
        "group_subtasks": {"mmlu": ["mmlu_law"], "gsm8k": []},
    }
    assert _metrics(found) == {"mmlu acc,none": 0.5, "gsm8k exact_match,strict-match": 0.125}


def test_what_runs_answered_is_kept_and_stands_by_contender(tmp_path: Path) -> None:
    runs = [made_run("tracin", seed, [1.0, 2.0], tasks={"colours acc,none": seed / 4}) for seed in (1, 2)]
    records = Records(tmp_path)
    for run in runs:
        records.write(run)
    assert [records.read(run.key) for run in runs] == runs
    by_name = {"tracin": contender("tracin", "selected")}
    (standing,) = standings_of({("tracin", "5%"): runs}, by_name, {}, metric="loss", task_of=["task"] * 2)
    assert standing.tasks == {"colours acc,none": (0.25, 0.5)}


@harness
def test_a_task_of_ones_own_is_answered_by_the_model_that_is_given(tmp_path: Path) -> None:
    """Right are the questions whose answer has the higher log-likelihood, which is worked out by hand here."""
    opened = load_model(ModelSettings(name=str(make_run(tmp_path / "run", rows=10).model), device="cpu"))
    opened.tokenizer.chat_template = None  # so that the prompt is the question alone
    asked = open_benchmarks(("colours",), folder=str(make_task(tmp_path / "tasks")), limit=None, shots=0)
    assert asked is not None
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = asked.scores(opened.model, opened.tokenizer)
    right = 0
    for question, choices, answer in QUESTIONS:
        likelihoods = []
        for choice in choices:
            prompt = opened.tokenizer(question, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + opened.tokenizer(" " + choice, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logs = opened.model(input_ids=ids).logits.log_softmax(dim=-1)[0, len(prompt) - 1 : -1]
            likelihoods.append(float(logs.gather(1, ids[0, len(prompt) :, None]).sum()))
        right += int(np.argmax(likelihoods)) == answer
    assert found == {"colours acc,none": pytest.approx(right / len(QUESTIONS), abs=1e-12)}
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    np.testing.assert_array_equal(before[2], np.random.get_state()[1])


@harness
def test_unknown_tasks_and_missing_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"no task 'colors'.*colours"):
        open_benchmarks(("colors",), folder=str(make_task(tmp_path / "tasks")), limit=None, shots=None)
    with pytest.raises(InvalidInput, match="task_folder"):
        open_benchmarks(("colours",), folder=str(tmp_path / "absent"), limit=None, shots=None)


@harness
def test_other_questions_are_another_run(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "tasks")
    asked = Benchmarks(names=("colours",), folder=folder, limit=None, shots=None, manager=None)
    first = asked.identity
    (folder / "colours.yaml").write_text((folder / "colours.yaml").read_text() + "repeats: 1\n")
    assert asked.identity != first


@harness
def test_every_contender_of_a_comparison_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=20)
    folder = make_task(tmp_path / "tasks")
    result = tamis.compare(
        model=run.model, pool=run.pool, target=run.target, eval=run.target, methods=["bm25"], budget=4, seeds=1,
        steps=1, lora_rank=2, device="cpu", tasks=["colours"], task_folder=str(folder), task_shots=0,
        out=tmp_path / "out",
    )  # fmt: skip
    assert isinstance(result, tamis.CompareResult)
    assert all(0 <= value <= 1 for s in result.standings for value in s.tasks["colours acc,none"])
    assert "Tasks of lm-evaluation-harness" in (tmp_path / "out" / "report.html").read_text()
