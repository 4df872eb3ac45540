import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.errors import InvalidInput
from tamis.identity import canonical_json, file_sha256, fingerprint, first_difference, text_sha256

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


def test_a_spec_that_is_not_json_is_refused() -> None:
    with pytest.raises(InvalidInput, match="plain JSON"):
        first_difference({"a": float("nan")}, {"a": 1})


def test_a_file_is_known_by_its_bytes_and_not_by_its_name(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000  # more than is read at once
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    (tmp_path / "c").write_bytes(content[:-1] + b"x")
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b") != file_sha256(tmp_path / "c")
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")
    assert text_sha256("abc") == file_sha256(tmp_path / "abc")
