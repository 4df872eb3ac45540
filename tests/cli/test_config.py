"""A settings file says the same as the settings it was written from, and flags are laid over it."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tamis import __version__
from tamis.cli.config import merge_settings, parse_pairs
from tamis.config import config_text, read_config, write_config
from tamis.errors import InvalidInput, InvalidSettings
from tamis.notation import METHOD_SUMMARIES, PROJECTION_NAMES
from tamis.settings import DoctorSettings, LoadingSettings, SelectSettings
from tamis.values import from_dict

# Anything a person might type, and what trips YAML: signs, quotes, numbers in disguise, words read as booleans.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(lambda t: t.strip() != ""),
    st.sampled_from(
        ["1e-5", "yes", "no", "on", "~", "null", "0x1f", "1_000", "12:30:00", "2020-01-01", "- a", "a: b", "#x"]
    ),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)
NAMES = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8).filter(str.isidentifier)


@st.composite
def select_settings(draw: st.DrawFn) -> SelectSettings:
    targets = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    method = draw(st.sampled_from(sorted(METHOD_SUMMARIES)))
    cheap = draw(st.sampled_from([None, *sorted(set(METHOD_SUMMARIES) - {method})]))
    shares = {name: draw(st.floats(0.1, 10)) for name in targets} if draw(st.booleans()) else {}
    return SelectSettings(
        model=draw(TEXTS),
        pool=tuple(draw(st.lists(TEXTS, min_size=1, max_size=3))),
        target=tuple(f"{name}=x.jsonl" for name in targets),
        method=method,
        set=draw(st.dictionaries(NAMES, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=4)),
        budget=draw(st.sampled_from(["500", "5%", "0.5%", "200k-tokens"])),
        shortlist=None if cheap is None else f"{cheap}:{draw(st.integers(1, 20))}x",
        aggregate=draw(st.sampled_from(["round-robin", "mean"])),
        share=shares,
        projection=draw(st.sampled_from([None, *PROJECTION_NAMES])),
        seed=draw(st.integers(0, 2**40)),
        near_threshold=draw(st.floats(0.01, 1)),
        revision=draw(st.one_of(st.none(), TEXTS)),
        chat_template=draw(st.one_of(st.none(), TEXTS)),
        drop_leaks=draw(st.booleans()),
        batch_tokens=draw(st.one_of(st.none(), st.integers(1, 10**6))),
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(select_settings())
def test_reading_what_was_written_gives_the_same_settings(chosen: SelectSettings) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        write_config("select", chosen, path)
        assert from_dict(SelectSettings, read_config(path)) == chosen


def test_the_file_names_the_version_and_puts_what_verbs_share_last() -> None:
    text = config_text("select", SelectSettings(model="m", pool=("p",), target=("t",)))
    assert f"tamis {__version__}" in text
    assert "relative to the current directory" in text
    keys = [line.split(":")[0] for line in text.splitlines() if line and line[0].isalpha()]
    shared = list(SelectSettings.__dataclass_fields__)[: len(LoadingSettings.__dataclass_fields__)]
    own = [name for name in SelectSettings.__dataclass_fields__ if name not in shared]
    assert keys[:3] == ["model", "pool", "target"]
    assert keys[: len(own)] == own and sorted(keys[len(own) :]) == sorted(shared)


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


BASE = "model: m\npool: [p.jsonl]\ntarget: t.jsonl\n"


def test_flags_override_the_file(tmp_path: Path) -> None:
    config = write(tmp_path, BASE + "budget: 500\nseed: 3\n")
    merged = merge_settings(SelectSettings, {"seed": 7, "pool": ["q.jsonl"]}, config)
    assert (merged.seed, merged.budget, merged.pool, merged.model) == (7, "500", ("q.jsonl",), "m")


def test_name_value_flags_override_single_names(tmp_path: Path) -> None:
    config = write(tmp_path, BASE + "method: less\nset: {lora_rank: 4, form: adam}\n")
    merged = merge_settings(SelectSettings, {"set": {"lora_rank": 16}}, config)
    assert merged.set == {"lora_rank": 16, "form": "adam"}


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    values = read_config(write(tmp_path, "a: 1e-5\nb: '1e-5'\nc: 2E+3\nd: -1e3\ne: e5\n"))
    assert values == {"a": 1e-5, "b": "1e-5", "c": 2000.0, "d": -1000.0, "e": "e5"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected a mapping of settings ('name: value'), got a list"),
        ("model: [\n", "line 2"),
        ("model: a\nmodel: b\n", "line 2: 'model' is written twice"),
        ("model: !!python/object:os.system x\n", "line 1"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_config(write(tmp_path, text))
    assert message in str(caught.value) and "run.yaml" in str(caught.value)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    with pytest.raises(InvalidInput, match="utf-8"):
        read_config(tmp_path / "latin.yaml")


def test_an_empty_file_leaves_what_the_flags_say(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"model": "m", "pool": ["p"], "target": ["t"]}
    assert merge_settings(SelectSettings, flags, write(tmp_path, "# nothing\n")).model == "m"


def test_an_unknown_key_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"run\.yaml: unknown setting 'metod', did you mean 'method'\?"):
        merge_settings(SelectSettings, {}, write(tmp_path, BASE + "metod: less\n"))


def test_a_file_of_another_verb_is_named_as_what_it_is(tmp_path: Path) -> None:
    asked = SelectSettings(model="m", pool=("p.jsonl",), target=("t.jsonl",), budget="7")
    path = write(tmp_path, config_text("select", asked))
    assert merge_settings(SelectSettings, {}, path) == asked
    with pytest.raises(
        InvalidSettings, match=r"settings of `tamis select`, and here there is no .*budget.*leave those"
    ):
        merge_settings(DoctorSettings, {}, path)
    with pytest.raises(InvalidSettings, match="did you mean 'method'"):
        merge_settings(SelectSettings, {}, write(tmp_path, config_text("select", asked) + "metod: less\n"))


def test_pairs_are_read_as_yaml_values() -> None:
    pairs = parse_pairs("--set", ["a=1e-5", "b=true", "c=[1, x]", "d=x=y", "e=", "f=null"])
    assert pairs == {"a": 1e-5, "b": True, "c": [1, "x"], "d": "x=y", "e": "", "f": None}
    assert math.isclose(pairs["a"], 1e-5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"], "expected NAME=VALUE"),
        (["=1"], "expected NAME=VALUE"),
        (["a=1", "a=2"], "given twice"),
        (["a=["], "quote"),
    ],
)
def test_a_bad_pair_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InvalidSettings, match=message):
        parse_pairs("--set", texts)
