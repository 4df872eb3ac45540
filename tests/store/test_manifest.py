import json
import random
from pathlib import Path

import pytest

from stage_folders import SPEC, finished_stage, open_writer
from tamis.errors import StoreCorrupted, StoreMismatch, Unsupported
from tamis.identity import fingerprint
from tamis.store import manifest as manifest_module
from tamis.store.manifest import (
    read_manifest,
    read_plan,
    refuse_other_spec,
    stage_path,
)


def test_a_refusal_names_field_values_and_remedy() -> None:
    with pytest.raises(StoreMismatch) as caught:
        refuse_other_spec({"m": {"dtype": "a"}}, {"m": {"dtype": "b"}}, where="out", advice="choose another --out")
    assert str(caught.value) == 'out was made with m.dtype="a", now m.dtype="b" is asked for; choose another --out'


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
