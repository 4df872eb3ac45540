import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tamis.collect import Collecting, Task
from tamis.corpus import tokenize
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.errors import InvalidSettings
from tamis.model.load import ModelSettings, load_tokenizer
from tamis.progress import NoProgress
from tamis.score.loss_drop import LossDrop, relative_drops
from tiny_run import chat, make_run, write_rows

SETTINGS = LossDrop(warmup_steps=10, warmup_update_rows=4, warmup_learning_rate=0.02, lora_rank=4)


def make_task(folder, *, model=None):
    """Twenty rows, a fifth of them sums, and two targets: sums, and talk."""
    run = make_run(folder / "run", rows=20)
    talk = write_rows(folder / "talk.jsonl", [chat("Say something about lamp.", "river stone cloud lamp bread")] * 3)
    settings = ModelSettings(name=str(model or run.model), device="cpu", dtype="float32")
    renderer = Renderer(load_tokenizer(settings), max_length=256)
    store = folder / "store"
    corpora = []
    for name, paths in (("pool", [run.pool]), ("target", [run.target, talk])):
        examples = read_examples([str(path) for path in paths])
        corpora.append(tokenize(name, examples, renderer, root=store, on_bad_row="fail", progress=NoProgress()))
    pool, target = corpora
    task = Task(
        pool=pool,
        target=target,
        target_names=("sums", "talk"),
        target_rows=np.arange(len(target)),
        target_group=target.examples.file_index.astype(np.int64),
        rows=np.arange(len(pool)),
        model_settings=settings,
        collecting=Collecting(),
        store=store,
    )
    return run, task


def slow_losses(model, corpus, rows):
    """Token by token, one row at a time."""
    losses = []
    for row in rows:
        tokens = corpus[int(row)]
        ids = torch.from_numpy(tokens.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        labelled = [t for t in range(1, ids.shape[1]) if tokens.supervised[t]]
        losses.append(-sum(float(log_probs[t - 1, ids[0, t]]) for t in labelled) / len(labelled))
    return np.array(losses)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    run, task = make_task(tmp_path_factory.mktemp("loss-drop"))
    return run, task, SETTINGS.score(task)


def test_scores_are_relative_drops_from_the_model_to_its_saved_checkpoint(scored):
    run, task, scores = scored
    before = slow_losses(AutoModelForCausalLM.from_pretrained(run.model).eval(), task.pool, task.rows)
    np.testing.assert_allclose(scores.extra["loss"], before, rtol=1e-5)
    columns = []
    for folder in sorted(task.store.glob("loss-drop-warm-up-*/step-*")):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model), folder).eval()
        columns.append((before - slow_losses(model, task.pool, task.rows)) / before)
    assert len(columns) == 2  # one checkpoint for each target
    first_to_first = np.abs(scores.values[:, 0] - columns[0]).max() < np.abs(scores.values[:, 0] - columns[1]).max()
    # Folders are named by fingerprint, so their order says nothing. Losses near 5 in float32, their difference over 5.
    np.testing.assert_allclose(scores.values, np.stack(columns if first_to_first else columns[::-1], 1), atol=2e-5)


def test_rows_like_a_target_drop_most_for_that_target(scored):
    run, _, scores = scored
    sums = np.isin(scores.rows, [*run.relevant, run.copies[0][1]])
    assert scores.group.tolist() == [0, 1]
    assert scores.values[sums, 0].min() > scores.values[~sums, 0].max()
    assert scores.values[~sums, 1].mean() > scores.values[sums, 1].mean()


def test_length_power_multiplies_by_a_power_of_the_supervised_tokens(scored):
    _, task, scores = scored
    rooted = replace(SETTINGS, length_power=0.5).score(task)
    expected = scores.values * np.sqrt(task.pool.supervised)[:, None]
    np.testing.assert_allclose(rooted.values, expected, rtol=1e-6)
    assert rooted.notes == (
        "loss-drop tends to prefer short answers, against which its scores were multiplied by "
        "supervised tokens ** 0.5.",
    )
    assert scores.notes[0].endswith("compare the lengths, or try length_power=0.5.")


def test_second_run_neither_trains_nor_loads_a_model(scored, monkeypatch):
    _, task, scores = scored
    monkeypatch.setattr("tamis.collect.load_model", lambda settings: pytest.fail("a model was loaded"))
    resumed = replace(task, _loaded=None, stages=[])
    again = SETTINGS.score(resumed)
    np.testing.assert_array_equal(again.values, scores.values)
    assert {cost.name: cost for cost in resumed.costs()} == {cost.name: cost for cost in task.costs()}
    assert sum(folder.name.startswith("loss-drop-warm-up") for folder in resumed.stages) == 2


def test_the_tasks_own_model_is_not_trained(tmp_path):
    run, task = make_task(tmp_path)
    LossDrop(warmup_steps=1, lora_rank=1).score(task)
    fresh = AutoModelForCausalLM.from_pretrained(run.model)
    for name, param in task.loaded.model.named_parameters():
        torch.testing.assert_close(param, fresh.get_parameter(name), rtol=0, atol=0)


def test_model_that_is_an_adapter_is_trained_on_from_where_it_stands(scored, tmp_path):
    _, first, _ = scored
    adapter = next(first.store.glob("loss-drop-warm-up-*/step-*"))
    run, task = make_task(tmp_path, model=adapter)
    scores = LossDrop(warmup_steps=2, warmup_learning_rate=1e-3).score(task)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model), adapter).eval()
    np.testing.assert_allclose(scores.extra["loss"], slow_losses(model, task.pool, task.rows), rtol=1e-5)
    assert "loss-drop warmed up the adapter given, from where it stands; its LoRA settings were not used" in task.notes


losses = hnp.arrays(np.float32, 6, elements=st.floats(2**-10, 100, width=32))


@given(losses, losses, st.floats(0.1, 10))
def test_relative_drop_has_no_unit_and_is_at_most_one(before, after, unit):
    drops = relative_drops(before, after)
    assert (drops <= 1).all()
    np.testing.assert_array_equal(np.sign(drops), np.sign(before - after))
    scaled = relative_drops((before * unit).astype(np.float32), (after * unit).astype(np.float32))
    np.testing.assert_allclose(scaled, drops, rtol=1e-4, atol=1e-6 * (1 + (after / before).max()))  # float32 losses


def test_relative_drop_by_hand():
    before, after = np.array([2, 2, 2, 0], np.float32), np.array([1, 3, 0, 1], np.float32)
    assert relative_drops(before, after).tolist() == [0.5, -0.5, 1, 0]  # a loss of 0 cannot drop


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, got 0"),
        ({"warmup_update_rows": 0}, "warmup_update_rows must be at least 1, got 0"),
        ({"warmup_learning_rate": -1.0}, "warmup_learning_rate must be a positive number, got -1.0"),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"length_power": float("nan")}, "length_power=nan: expected a finite number"),
    ],
)
def test_impossible_settings_are_refused(settings, problem):
    with pytest.raises(InvalidSettings, match=re.escape(problem)):
        LossDrop(**settings)
