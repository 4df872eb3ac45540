"""Every setting of a comparison reaches its runs, and a run starts, counts, measures and fails as its own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tamis
from comparison_runs import contender, made_run
from fake_task import FakeCorpus, random_tokens
from score_task import save_tiny
from tamis.comparison.cells import Cell, Price, make_cell
from tamis.comparison.records import Records
from tamis.errors import InvalidSettings, NonFinite
from tamis.model.flops import TrainedMatrices
from tamis.progress import NoProgress
from tamis.runs import compare_training
from tamis.runs.compare import _price_of
from tamis.runs.compare_grid import make_missing
from tamis.runs.compare_training import TrainingBench, _Clock, training_settings
from tamis.runs.train_setup import open_model
from tamis.training.loop import Spent, TrainSettings


def settings(**changes: Any) -> tamis.CompareSettings:
    return tamis.CompareSettings(
        **{"model": "m", "pool": ("p",), "target": ("t",), "lora_rank": 2, "device": "cpu", **changes}
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "llama"))


class Corpus(FakeCorpus):
    def take(self, rows: Any) -> list[Any]:
        return [self[int(row)] for row in rows]


POOL = Corpus("pool", random_tokens([9, 5, 12, 7, 4, 10], seed=1))
HELD_OUT = Corpus("target", random_tokens([8, 6, 11], seed=2))


def bench(model: str, out: Path, **changes: Any) -> TrainingBench:
    own = settings(model=model, out=str(out), **changes)
    return TrainingBench(
        settings=own,
        rendered=SimpleNamespace(pool=POOL, target=HELD_OUT),  # type: ignore[arg-type]
        held_out=np.arange(3),
        price=_price_of(own.train_settings(out="o", steps=1, seed=0)),
        held={},
    )


def cell(name: str = "uniform", *, seed: int = 0, steps: int = 2) -> Cell:
    return make_cell(
        contender(name, name if name == "uniform" else "selected"), budget="5%", seed=seed, steps=steps,
        rows=np.arange(6), common={},
    )  # fmt: skip


def spent(checkpoint: int, elapsed_s: float) -> Spent:
    return Spent(checkpoint=checkpoint, rows=1, tokens=1, supervised_tokens=1, squared_tokens=1, elapsed_s=elapsed_s)


def test_every_setting_of_training_is_passed_on() -> None:
    own = settings(
        learning_rate=3e-3, warmup_share=0.2, weight_decay=0.07, clip=0.4, update_rows=3, save_steps=17,
        batch_tokens=333, epochs=5,
    )  # fmt: skip
    assert training_settings(own, steps=9) == TrainSettings(
        steps=9, save_steps=17, update_rows=3, learning_rate=3e-3, lr_warmup_share=0.2, weight_decay=0.07, clip=0.4,
        batch_tokens=333,
    )  # fmt: skip


def test_training_by_default_has_the_rate_of_its_kind_and_no_clip_means_none() -> None:
    assert training_settings(settings(), steps=1).learning_rate == 2e-4
    assert training_settings(settings(tune="full", lora_rank=None), steps=1).learning_rate == 2e-5
    assert training_settings(settings(clip=0), steps=1).clip is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "another"),
        ("pool", ("q",)),
        ("target", ("u",)),
        ("learning_rate", 3e-3),
        ("warmup_share", 0.2),
        ("weight_decay", 0.07),
        ("clip", 0.4),
        ("lora_rank", 5),
        ("lora_alpha", 3.0),
        ("lora_targets", ("q_proj",)),
        ("drop_leaks", True),
        ("save_steps", 17),
        ("oversample", 6),
        ("dtype", "bfloat16"),
        ("attention", "eager"),
        ("max_length", 99),
        ("chat_template", "chatml.jinja"),
        ("row_format", "messages"),
        ("on_bad_row", "skip"),
    ],
)
def test_every_setting_reaches_the_runs_of_online_methods(name: str, value: Any) -> None:
    before, after = settings(methods=("online:tilt",)), settings(methods=("online:tilt",), **{name: value})
    for online in (None, after.contenders[0]):
        was = before.train_settings(out="o", steps=4, seed=3, online=online)
        now = after.train_settings(out="o", steps=4, seed=3, online=online)
        assert getattr(now, name) == value and getattr(was, name) != value
        assert (now.seed, now.steps, now.out) == (3, 4, "o")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "another"),
        ("pool", ("q",)),
        ("target", ("u",)),
        ("aggregate", "mean"),
        ("duplicates", "near"),
        ("drop_leaks", True),
        ("seed", 3),
        ("batch_tokens", 333),
        ("store", "shared"),
        ("dtype", "bfloat16"),
        ("attention", "eager"),
        ("max_length", 99),
        ("chat_template", "chatml.jinja"),
        ("row_format", "messages"),
        ("on_bad_row", "skip"),
    ],
)
def test_every_setting_reaches_the_selections(name: str, value: Any) -> None:
    before, after = settings(methods=("bm25:3x+tracin",)), settings(methods=("bm25:3x+tracin",), **{name: value})
    was, now = (own.select_settings(own.contenders[0], budget="7", out="o") for own in (before, after))
    assert getattr(now, name) == value and getattr(was, name) != value
    assert (now.method, now.shortlist, now.budget, now.out) == ("tracin", "bm25:3x", "7", "o")


def test_what_is_called_otherwise_in_a_run_is_passed_on_too() -> None:
    own = settings(
        methods=("online:tilt@sources:2",), update_rows=5, tune="full", lora_rank=None,
        set={"online:tilt@sources:2.cold_start": 7, "online:tilt@sources:2.oversample": 9},
    )  # fmt: skip
    made = own.train_settings(out="o", steps=4, seed=3, online=own.contenders[0])
    assert (made.keep, made.tune, made.method, made.candidates) == (5, "full", "tilt", "sources:2")
    assert made.set == {"cold_start": 7} and made.oversample == 9


def test_a_seed_has_an_adapter_start_of_its_own(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[torch.Tensor] = []

    def started(trained: Any, *args: Any, **more: Any) -> None:
        starts.append(next(p.detach().clone() for name, p in trained.named_parameters() if "lora_A" in name))

    monkeypatch.setattr(compare_training, "fine_tune", started)
    own = bench(model, tmp_path, seed=3)
    for seed in (3, 4, 3):
        own.run(cell(seed=seed), lambda steps: None)
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
    for seed, start in zip((3, 4), starts, strict=False):
        asked = own.settings.train_settings(out="o", steps=1, seed=seed)
        opened = open_model(asked, dtype="float32").model
        assert torch.equal(start, next(p for name, p in opened.named_parameters() if "lora_A" in name))


def test_a_loss_that_is_no_number_names_contender_and_seed(model: str, tmp_path: Path) -> None:
    own = bench(model, tmp_path, learning_rate=1e30, warmup_share=0.0, clip=0)
    with pytest.raises(NonFinite, match=r"^bm25, seed 5: .*not finite|^bm25, seed 5: the gradient"):
        own.run(cell("bm25", seed=5, steps=4), lambda steps: None)


def test_a_run_took_the_seconds_of_all_its_intervals(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*args: Any, on_checkpoint: Any, **more: Any) -> None:
        for checkpoint, elapsed_s in enumerate((2.0, 3.0, 4.5)):
            on_checkpoint(spent(checkpoint, elapsed_s))

    monkeypatch.setattr(compare_training, "fine_tune", timed)
    found = bench(model, tmp_path).run(cell(), lambda steps: None)
    assert found is not None and found.train_seconds == 9.5


def test_a_run_that_goes_on_knows_the_seconds_of_the_one_that_was_killed(tmp_path: Path) -> None:
    first = _Clock(tmp_path)
    first.add(spent(0, 2.0))
    first.add(spent(1, 3.0))
    again = _Clock(tmp_path)
    again.add(spent(1, 5.0))  # the last interval is made again
    again.add(spent(2, 1.0))
    assert (first.total, again.total, _Clock(None).total) == (5.0, 8.0, 0)
    (tmp_path / "seconds.json").write_text('{"0": 2.')
    assert _Clock(tmp_path).total == 0


def test_what_a_killed_run_left_is_removed_once_its_record_exists(model: str, tmp_path: Path) -> None:
    records, done, other = Records(tmp_path / "records"), cell(seed=1), cell(seed=2)
    records.write(made_run("uniform", 1, [1.0], key=done.key))
    folders = [tmp_path / "unfinished" / one.key for one in (done, other)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "seconds.json").write_text("{}")
    make_missing(bench(model, tmp_path), [done], records, progress=NoProgress())
    assert [folder.exists() for folder in folders] == [False, True]


@pytest.mark.parametrize(
    ("texts", "pattern", "wanted"),
    [
        (["It IS 7", "it is 8", "9"], None, [True, False, False]),
        (["= 1 = 7", "= 7 = 8", "nothing"], r"= (\d)", [True, False, False]),
        (["", "", ""], r"= (\d)", [False, False, False]),
    ],
)
def test_an_answer_is_right_if_it_says_what_the_row_says_and_never_if_that_is_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], pattern: str | None, wanted: Any
) -> None:
    asked: list[int] = []

    def answers(*args: Any, max_tokens: int, **more: Any) -> list[str]:
        asked.append(max_tokens)
        return texts

    right = iter(["it is = 7", "it is = 7", ""] if pattern else ["it is 7", "it is 7", ""])
    monkeypatch.setattr(compare_training, "fine_tune", lambda *args, **more: None)
    monkeypatch.setattr(compare_training, "written_answers", answers)
    monkeypatch.setattr(compare_training, "last_answer", lambda tokenizer, example: next(right))
    own = bench(model, tmp_path, metric="exact-match", answer_pattern=pattern, answer_tokens=13)
    found = own.run(cell(), lambda steps: None)
    assert found is not None and list(found.row_matches) == wanted and found.answers == tuple(texts)
    assert found.exact_match == pytest.approx(sum(wanted) / 3) and asked == [13]


def test_the_price_of_a_comparison_is_of_the_model_that_it_trains(model: str) -> None:
    block = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 24
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    whole = _price_of(settings(model=model, tune="full", lora_rank=None).train_settings(out="o", steps=1, seed=0))
    assert whole.trained == TrainedMatrices(body=2.0 * block, head=16.0 * vocabulary)
    sides = 2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24)  # of a block: queries and output, keys and values, the rest
    for rank in (2, 16):
        own = settings(model=model, lora_rank=None if rank == 16 else rank)
        adapter = _price_of(own.train_settings(out="o", steps=1, seed=0))
        assert adapter.trained == TrainedMatrices(body=2.0 * rank * sides, head=0.0)
        assert adapter.shape.block_products == 2 * block + 2 * rank * sides
    few = settings(model=model, lora_targets=("q_proj",)).train_settings(out="o", steps=1, seed=0)
    assert isinstance(_price_of(few), Price) and _price_of(few).trained.body == 2 * 2 * (16 + 16)


def test_weights_of_rows_are_refused_at_once() -> None:
    for label in ("influence-distillation", "mine"):
        with pytest.raises(InvalidSettings, match=f"{label} weights its rows.*leave --set {label}.weights out"):
            settings(
                methods=(label if label != "mine" else "mine=influence-distillation",),
                set={f"{label}.weights": "second-order"},
            )
    allowed = settings(methods=("influence-distillation",), set={"influence-distillation.weights": "none"})
    assert allowed.set == {"influence-distillation.weights": "none"}


def test_a_run_killed_while_its_record_is_written_still_has_its_checkpoints(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, records, one = bench(model, tmp_path, save_steps=1), Records(tmp_path / "records"), cell(steps=3)

    def killed(self: Records, run: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Records, "write", killed)
        make_missing(own, [one], records, progress=NoProgress())
    folder = tmp_path / "unfinished" / one.key
    assert sorted(path.name for path in folder.glob("step-*")) == [f"step-00000{n}" for n in (1, 2, 3)]
    make_missing(own, [one], records, progress=NoProgress())
    assert records.has(one.key) and not folder.exists()
