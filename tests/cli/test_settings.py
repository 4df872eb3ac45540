"""Settings are checked when they are made, with messages that name the setting and suggest the nearest name."""

from __future__ import annotations

import pickle
from typing import Any, get_type_hints

import pytest

from tamis.errors import InvalidSettings
from tamis.notation import (
    GRADIENT_METHODS,
    METHOD_SUMMARIES,
    PROJECTION_NAMES,
    Shortlist,
    parse_shortlist,
    target_parts,
)
from tamis.projection import PROJECTIONS
from tamis.score import METHODS
from tamis.settings import (
    AttributeSettings,
    CompareSettings,
    DoctorSettings,
    PlanSettings,
    ProxySettings,
    SelectSettings,
    SharedSettings,
    TrainRunSettings,
    VerifySettings,
)
from tamis.values import from_dict, nearest, to_dict

REQUIRED: dict[str, Any] = {"model": "m", "pool": ("p.jsonl",), "target": ("t.jsonl",)}


def test_the_listed_methods_and_projections_are_those_that_exist() -> None:
    assert list(METHOD_SUMMARIES) == list(METHODS)
    assert set(GRADIENT_METHODS) <= set(METHODS)
    assert set(PROJECTION_NAMES) == set(PROJECTIONS)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model", " ", "model=' ': expected a text that is not empty"),
        ("pool", (), "pool: expected at least one file"),
        ("target", ("=x",), "target='=x': expected a path or NAME=PATH"),
        ("target", ("a/t.jsonl", "b/t.jsonl"), "target: two are called 't'"),
        ("method", "tracn", "unknown method 'tracn', did you mean 'tracin'? (methods: uniform"),
        ("set", {"two words": 1}, "'two words' is not the name of a method setting"),
        ("set", {"a": {"b": 1}}, "set.a={'b': 1}: expected a text"),
        ("set", {"a": float("nan")}, "set.a=nan: expected a finite number"),
        ("budget", "many", "budget"),
        ("budget", True, "budget"),
        ("shortlist", "bm25", "shortlist='bm25': expected METHOD:MULTIPLE"),
        ("shortlist", "bm52:5x", "unknown method 'bm52', did you mean 'bm25'?"),
        ("shortlist", "bm25:0.5x", "at least the budget itself"),
        ("shortlist", "sources:16x", "expected a whole number of rows"),
        ("shortlist", "sources:1", "expected a whole number of rows"),
        ("shortlist", "sources", "or 'sources:8'"),
        ("shortlist", "tracin:5x", "uses the chosen method 'tracin' itself"),
        ("aggregate", "max", "aggregate='max': expected one of round-robin, mean"),
        ("share", {"q": 1}, "there is no target called 'q' (targets: t)"),
        ("share", {"t": -1}, "above zero"),
        ("share", {"t": 0}, "above zero"),
        ("projection", "hadamrad", "did you mean 'hadamard'?"),
        ("projection_dim", 0, "projection_dim=0: expected at least 1"),
        ("seed", -1, "seed=-1: expected at least 0"),
        ("seed", True, "seed=True: expected a whole number, got bool"),
        ("max_length", 1, "max_length=1: expected at least 2"),
        ("dtype", "bf16", "did you mean 'bfloat16'?"),
        ("near_threshold", 1.5, "near_threshold=1.5"),
        ("near_threshold", float("inf"), "expected a finite number"),
        ("batch_tokens", 0, "batch_tokens=0"),
        ("shard_rows", 0, "shard_rows=0"),
        ("report", "yes", "report='yes': expected true or false, got str"),
        ("out", "", "out='': expected a text that is not empty"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        SelectSettings(**{**REQUIRED, setting: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "anchord"}, "unknown method 'anchord', did you mean 'anchored'? (methods: filter-then-weight"),
        ({"set": {"keep": 4}}, "set.keep: keep belongs to every method; write --keep 4"),
        ({"set": {"source_rows": 4}}, "source_rows belongs to every method; write --source-rows 4"),
        ({"source_temperature": 1.0}, "source_temperature: candidates='exact' are not scored by source"),
        ({"set": {"two words": 1}}, "'two words' is not the name of a method setting"),
        ({"steps": None}, "steps, epochs: expected one of them, got neither; pass --steps or --epochs"),
        ({"epochs": 1}, "steps, epochs: expected one of them, got both"),
        ({"steps": None, "epochs": 0}, "epochs=0.0: expected a number above zero"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"keep": 0}, "keep=0: expected at least 1"),
        ({"forecast_every": -1}, "forecast_every=-1: expected at least 0"),
        ({"held_out": 1.0}, "held_out=1.0: expected a share of the target rows"),
        ({"held_out": 0.1, "eval": ("e",)}, "held_out, eval: rows that measure come from one of them"),
        ({"held_out": 0.0, "eval_steps": 5}, "eval_steps: no row measures; pass --eval, or --held-out"),
        ({"patience": 2}, "patience: counts measurements, and none is made on the way; pass --eval-steps"),
        ({"patience": 2, "eval_steps": 5, "save_steps": 10}, "but save_steps=10 and eval_steps=5"),
        ({"eval": ("a/e.jsonl", "b/e.jsonl")}, "eval: two are called 'e'; name them: --eval NAME=PATH"),
        ({"learning_rate": 0}, "learning_rate=0.0: expected a number above zero"),
        ({"warmup_share": 1}, "warmup_share=1.0: expected at least 0 and below 1"),
        ({"beta2": 1.0}, "beta2=1.0: expected at least 0 and below 1"),
        ({"clip": -1}, "clip=-1.0: expected at least 0"),
        ({"scheduler": "cosin"}, "did you mean 'cosine'?"),
        ({"tune": "full", "lora_rank": 4}, "tune='full' trains no adapter; leave lora_rank"),
        ({"lora_alpha": 0}, "lora_alpha=0.0: expected a number above zero"),
        ({"report_to": ("wand",)}, "report_to='wand': expected tensorboard or wandb, did you mean 'wandb'?"),
        ({"dtype": "float16"}, "dtype='float16': online selection does not scale losses"),
        ({"device": "cuda:1"}, "pass --device cuda and set CUDA_VISIBLE_DEVICES=1"),
        ({"reduction": "row"}, "did you mean 'rows'?"),
    ],
)
def test_a_training_run_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        TrainRunSettings(**{**REQUIRED, "steps": 5, **changes})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fifth_of_the_target_measures_unless_other_rows_do() -> None:
    assert TrainRunSettings(**REQUIRED, steps=5).held_out_share == 0.2
    assert TrainRunSettings(**REQUIRED, steps=5, eval="e").held_out_share == 0.0  # type: ignore[arg-type]
    assert TrainRunSettings(**REQUIRED, steps=5, held_out=0).held_out_share == 0.0


def test_missing_shares_are_named() -> None:
    with pytest.raises(InvalidSettings, match="b has no share"):
        SelectSettings(**{**REQUIRED, "target": ("a=x", "b=y")}, share={"a": 1.0})


@pytest.mark.parametrize(
    ("given", "kept"), [(500, "500"), (0.05, "5%"), ("5%", "5%"), ("200k-tokens", "200k-tokens"), (1.0, "100%")]
)
def test_a_budget_may_be_a_number_or_a_text(given: Any, kept: str) -> None:
    assert SelectSettings(**REQUIRED, budget=given).budget == kept


def test_lists_become_tuples_and_mappings_are_copied() -> None:
    given = {"a": 1}
    settings = SelectSettings(model="m", pool=["p"], target="t", set=given)  # type: ignore[arg-type]
    given["a"] = 2
    assert settings.pool == ("p",) and settings.target == ("t",) and settings.set == {"a": 1}
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("data/gsm8k.jsonl", "gsm8k", "data/gsm8k.jsonl"),
        ("maths=data/gsm8k.jsonl", "maths", "data/gsm8k.jsonl"),
        ("./a=b.jsonl", "a=b", "./a=b.jsonl"),
        ("targets/*.jsonl", "targets", "targets/*.jsonl"),
        ("targets/mmlu_*.jsonl", "mmlu", "targets/mmlu_*.jsonl"),
        ("org/squad@validation", "squad", "org/squad@validation"),
        ("code=org/mbpp:full@test", "code", "org/mbpp:full@test"),
    ],
)
def test_a_target_is_named_or_names_itself(text: str, name: str, path: str) -> None:
    assert target_parts(text) == (name, path)


def test_a_shortlist_is_a_method_and_a_multiple() -> None:
    assert parse_shortlist("bm25:5x") == Shortlist(method="bm25", multiple=5.0)
    assert parse_shortlist("rds+:2.5") == Shortlist(method="rds+", multiple=2.5)


def test_a_shortlist_may_be_a_sample_of_every_source() -> None:
    assert parse_shortlist("sources:16") == Shortlist(method=None, per_source=16)


@pytest.mark.parametrize("cls", [SelectSettings, DoctorSettings, PlanSettings])
def test_settings_survive_a_round_trip_through_plain_values(cls: type[Any]) -> None:
    settings = cls(**REQUIRED)
    assert from_dict(cls, to_dict(settings)) == settings


def test_a_training_runs_settings_survive_it_too() -> None:
    settings = TrainRunSettings(**REQUIRED, epochs=2, lora_targets=("q", "v"), set={"ridge": 2.0})
    assert from_dict(TrainRunSettings, to_dict(settings)) == settings


def test_an_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(InvalidSettings, match=r"run\.yaml: unknown setting 'modle', did you mean 'model'\?"):
        from_dict(SelectSettings, {**REQUIRED, "modle": "x"}, origin="run.yaml")
    with pytest.raises(InvalidSettings, match="unknown setting 'drop-leaks', did you mean 'drop_leaks'"):
        from_dict(SelectSettings, {**REQUIRED, "drop-leaks": True})
    with pytest.raises(InvalidSettings, match="unknown setting 'zzz'; known are model, pool"):
        from_dict(SelectSettings, {**REQUIRED, "zzz": True})


def test_a_missing_setting_says_how_to_give_it() -> None:
    said = r"pool is missing or empty: pass --pool \(in Python pool=\), or set 'pool' in the --config file"
    for values in ({"model": "m"}, {"model": "m", "pool": []}):
        with pytest.raises(InvalidSettings, match=said):
            from_dict(SelectSettings, values)


def test_plan_settings_name_the_method_they_are_for() -> None:
    assert PlanSettings(**REQUIRED, set={"rds+.positions": "all"}).set
    with pytest.raises(InvalidSettings, match=r"write METHOD\.NAME=VALUE"):
        PlanSettings(**REQUIRED, set={"lora_rank": 4})
    with pytest.raises(InvalidSettings, match=r"unknown method 'lss', did you mean 'less'"):
        PlanSettings(**REQUIRED, set={"lss.lora_rank": 4})
    with pytest.raises(InvalidSettings, match=r"utilisation=1\.5"):
        PlanSettings(**REQUIRED, utilisation=1.5)
    with pytest.raises(InvalidSettings, match="utilisation: is assumed where nothing is measured; leave it or"):
        PlanSettings(**REQUIRED, measure=True, utilisation=0.5)
    with pytest.raises(InvalidSettings, match="assume_device: is assumed where nothing is measured"):
        PlanSettings(**REQUIRED, measure=True, assume_device="a100")


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("qqqq", ["alpha", "beta"]) == ""
    assert nearest("alhpa", ["alpha", "beta"]) == ", did you mean 'alpha'?"


VERBS: list[tuple[type[Any], dict[str, Any]]] = [
    (SelectSettings, REQUIRED),
    (DoctorSettings, REQUIRED),
    (PlanSettings, REQUIRED),
    (TrainRunSettings, {**REQUIRED, "steps": 5}),
    (CompareSettings, {**REQUIRED, "eval": ("e.jsonl",)}),
    (ProxySettings, REQUIRED),
    (AttributeSettings, {"run": "r", "target": ("t.jsonl",)}),
    (VerifySettings, {"run": "r", "target": ("t.jsonl",)}),
]


@pytest.mark.parametrize(("cls", "given"), VERBS)
def test_no_verb_takes_an_empty_text(cls: type[Any], given: dict[str, Any]) -> None:
    """A shell's unset variable must not pass for a folder, a device or a revision."""
    texts = [name for name, hint in get_type_hints(cls).items() if hint in (str, str | None)]
    assert {"device", "out"} <= set(texts)
    for name in texts:
        with pytest.raises(InvalidSettings, match=name):
            cls(**{**given, name: " "})


@pytest.mark.parametrize(("cls", "given"), VERBS)
def test_every_verb_checks_what_all_share(cls: type[Any], given: dict[str, Any]) -> None:
    assert issubclass(cls, SharedSettings)
    for name, value, message in (
        ("max_length", 1, "max_length=1: expected at least 2"),
        ("max_length", "long", "max_length='long': expected a whole number, got str"),
        ("on_bad_row", "skp", "did you mean 'skip'"),
        ("row_format", "mesages", "did you mean 'messages'"),
        ("trust_remote_code", 1, "trust_remote_code=1: expected true or false, got int"),
    ):
        with pytest.raises(InvalidSettings, match=message):
            cls(**{**given, name: value})


@pytest.mark.parametrize(("cls", "given"), VERBS)
def test_settings_of_every_verb_survive_a_round_trip(cls: type[Any], given: dict[str, Any]) -> None:
    settings = cls(**given)
    plain = to_dict(settings)
    assert from_dict(cls, plain) == settings
    assert set(plain) == set(cls.__dataclass_fields__)
    assert list(plain)[-len(SharedSettings.__dataclass_fields__) :] == list(SharedSettings.__dataclass_fields__)


def test_flagged_rows_cannot_be_left_out_of_sources() -> None:
    with pytest.raises(InvalidSettings, match="flagged rows cannot be left out"):
        SelectSettings(**REQUIRED, shortlist="sources:8", drop_flagged=True)
