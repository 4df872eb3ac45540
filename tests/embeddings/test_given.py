"""Given vectors are found by id, and everything that does not fit has its own message."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tamis.embeddings import Given, given, save_embeddings
from tamis.errors import InvalidInput, InvalidSettings, NonFinite
from tamis.identity import file_sha256

IDS = ["a", "b", "c"]
VALUES = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])


@pytest.fixture
def folder(tmp_path):
    save_embeddings(tmp_path / "given", IDS, VALUES)
    return tmp_path / "given"


def test_rows_are_found_by_id_and_scaled(folder):
    found = Given(path=str(folder)).rows(["b", "a", "c", "a"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[0, 1], [0.6, 0.8], [0, 0], [0.6, 0.8]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_are_read_too(folder, dtype):
    (folder / "embeddings.npy").unlink()
    save_file({"embeddings": torch.from_numpy(VALUES).to(dtype)}, folder / "embeddings.safetensors")
    torch.testing.assert_close(Given(path=str(folder)).rows(["a"]), torch.tensor([[0.6, 0.8]]))


def test_identity_follows_the_bytes(folder):
    before = Given(path=str(folder)).identity
    assert Given(path=str(folder)).identity == before
    save_embeddings(folder, IDS, VALUES + 1)
    after = Given(path=str(folder)).identity
    save_embeddings(folder, IDS[::-1], VALUES + 1)
    assert len({str(before), str(after), str(Given(path=str(folder)).identity)}) == 3


def test_files_are_hashed_once_in_a_process_until_they_change(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(given, "file_sha256", lambda file: hashed.append(file.name) or file_sha256(file))
    for name in ("ids.json", "embeddings.npy"):
        os.utime(folder / name, (1e9, 1e9))
    before = Given(path=str(folder)).identity
    assert Given(path=str(folder)).identity == before
    assert sorted(hashed) == ["embeddings.npy", "ids.json"]
    save_embeddings(folder, IDS, VALUES + 1)
    os.utime(folder / "embeddings.npy", (1e9 + 1, 1e9 + 1))
    assert Given(path=str(folder)).identity["vectors"] == file_sha256(folder / "embeddings.npy") != before["vectors"]


def test_missing_row_is_named(folder):
    with pytest.raises(InvalidInput, match="has no embedding for 1 of 2 rows \\(first: 'z'\\)"):
        Given(path=str(folder)).rows(["a", "z"])


def test_vector_that_is_not_finite_is_named(folder):
    save_embeddings(folder, IDS, np.array([[1.0], [np.nan], [2.0]]))
    given = Given(path=str(folder))
    assert given.rows(["a", "c"]).tolist() == [[1.0], [1.0]]
    with pytest.raises(NonFinite, match="the embedding of row 'b' has NaN or infinite entries"):
        given.rows(["a", "b"])


def spoil(folder, what):
    if what == "no ids":
        (folder / "ids.json").unlink()
    elif what == "two files":
        (folder / "embeddings.safetensors").write_bytes(b"")
    elif what == "fewer ids":
        (folder / "ids.json").write_text(json.dumps(IDS[:2]))
    elif what == "same id":
        (folder / "ids.json").write_text(json.dumps(["a", "b", "a"]))
    elif what == "numbers":
        (folder / "ids.json").write_text("[1, 2, 3]")
    elif what == "no json":
        (folder / "ids.json").write_text("[")
    elif what == "truncated":
        (folder / "embeddings.npy").write_bytes(b"\x93NUMPY")
    elif what == "objects":
        np.save(folder / "embeddings.npy", np.array([[{}]]), allow_pickle=True)
    elif what == "one axis":
        np.save(folder / "embeddings.npy", np.zeros(3))
    elif what == "integers":
        np.save(folder / "embeddings.npy", np.zeros((3, 2), np.int64))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no ids", "must hold ids.json and one of embeddings.npy and embeddings.safetensors"),
        ("two files", "must hold ids.json and one of"),
        ("fewer ids", "names 2 rows but embeddings.npy holds 3; they must be equal"),
        ("same id", "names row 'a' more than once"),
        ("numbers", "must hold a list of row ids, all strings"),
        ("no json", "is not valid JSON"),
        ("truncated", "embeddings.npy cannot be read"),
        ("objects", "embeddings.npy cannot be read"),
        ("one axis", r"holds float64 of shape \(3,\); expected floating-point \(rows, numbers\)"),
        ("integers", r"holds int64 of shape \(3, 2\)"),
    ],
)
def test_spoilt_folders_say_what_is_wrong(folder, what, message):
    spoil(folder, what)
    with pytest.raises(InvalidInput, match=message):
        Given(path=str(folder)).rows(["a"])


def test_an_array_that_does_not_fit_its_ids_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"got 2 ids for an array of shape \(3, 2\); expected one row per id"):
        save_embeddings(tmp_path, IDS[:2], VALUES)


def test_a_path_is_needed():
    with pytest.raises(InvalidSettings, match="embedding 'given' needs path"):
        Given()
