import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage_folders import SPEC, finished_stage, open_writer
from tamis.errors import InvalidInput, StoreCorrupted, StoreMismatch, Unsupported
from tamis.store import manifest as manifest_module
from tamis.store.manifest import (
    canonical_json,
    fingerprint,
    first_difference,
    read_manifest,
    read_plan,
    refuse_other_spec,
    stage_path,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SPECS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)


@given(SPECS)
def test_fingerprint_does_not_depend_on_key_order(spec: dict[str, Any]) -> None:
    keys = list(spec)
    random.Random(0).shuffle(keys)
    assert fingerprint({key: spec[key] for key in keys}) == fingerprint(spec)


@given(SPECS, SPECS)
def test_specs_differ_exactly_when_their_fingerprints_do(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (first_difference(one, other) is None) == (fingerprint(one) == fingerprint(other))


def test_fingerprint_is_the_sha256_of_canonical_json() -> None:
    # The same from a shell: printf of this text, piped into sha256sum.
    assert canonical_json({"b": "é", "a": (1, 2.5, None)}) == '{"a":[1,2.5,null],"b":"\\u00e9"}'
    assert fingerprint({"b": "é", "a": (1, 2.5, None)}).startswith("45584828a616e524")


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        ({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}, ("b.c.1", 2, 3)),
        ({"a": 1}, {}, ("a", 1, "(absent)")),
        ({}, {"z": 0, "a": None}, ("a", "(absent)", None)),
        ({"a": 1}, {"a": 1.0}, ("a", 1, 1.0)),
        ({"a": True}, {"a": 1}, ("a", True, 1)),
        ({"a": [1]}, {"a": [1, 2]}, ("a", [1], [1, 2])),
        ({"a": (1, 2)}, {"a": [1, 2]}, None),
    ],
)
def test_first_difference_has_the_dotted_path_and_both_values(
    stored: dict[str, Any], wanted: dict[str, Any], expected: object
) -> None:
    assert first_difference(stored, wanted) == expected


def test_a_refusal_names_field_values_and_remedy() -> None:
    with pytest.raises(StoreMismatch) as caught:
        refuse_other_spec({"m": {"dtype": "a"}}, {"m": {"dtype": "b"}}, where="out", advice="choose another --out")
    assert str(caught.value) == 'out was made with m.dtype="a", now m.dtype="b" is asked for; choose another --out'


def test_a_spec_that_is_not_json_is_refused() -> None:
    with pytest.raises(InvalidInput, match="plain JSON"):
        first_difference({"a": float("nan")}, {"a": 1})


def test_the_folder_is_named_after_stage_and_fingerprint(tmp_path: Path) -> None:
    assert stage_path(tmp_path, "features", SPEC) == tmp_path / f"features-{fingerprint(SPEC)[:12]}"


def test_plan_and_manifest_come_back_as_written(tmp_path: Path) -> None:
    folder = finished_stage(tmp_path, num_rows=40)
    manifest, plan = read_manifest(folder), read_plan(folder)
    assert manifest is not None and manifest.plan == plan
    assert plan is not None and plan.fixed == {"batch": 7} and plan.spec == SPEC
    assert [(s.start, s.stop) for s in manifest.shards] == [(0, 16), (16, 32), (32, 40)]
    assert manifest.tensors["feature"].row_shape == (7,) and manifest.tensors["tokens"].ragged
    assert manifest.tensors["half"].dtype == "BF16"


def test_nothing_is_read_from_an_empty_folder(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None and read_plan(tmp_path) is None


@pytest.mark.parametrize("file", ["plan.json", "manifest.json"])
def test_a_flipped_byte_anywhere_in_the_json_is_detected(tmp_path: Path, file: str) -> None:
    folder = finished_stage(tmp_path, num_rows=20)
    path = folder / file
    good = path.read_bytes()
    read = read_plan if file == "plan.json" else read_manifest
    chance = random.Random(1)
    for position in chance.sample(range(len(good)), min(150, len(good))):
        flipped = bytearray(good)
        flipped[position] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(StoreCorrupted, match="delete the folder"):
            read(folder)
    path.write_bytes(good)
    read(folder)


def test_an_unknown_format_is_refused_with_the_version_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "FORMAT", 2)
        folder = open_writer(tmp_path).path
    with pytest.raises(Unsupported, match=r"has store format 2, this version reads format 1"):
        read_plan(folder)


def test_a_plan_with_extra_white_space_is_not_what_was_written(tmp_path: Path) -> None:
    folder = open_writer(tmp_path).path
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(StoreCorrupted):
        read_plan(folder)
