"""What a stage was computed from, as JSON: the plan written first, the manifest written last, and their comparison.

Both files carry a SHA-256 of themselves, so that a flipped byte is never taken for another setting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tamis.disk import create_atomically, disk_errors, replace_atomically
from tamis.errors import StoreCorrupted, StoreMismatch, Unsupported
from tamis.identity import canonical_json, fingerprint, first_difference

__all__ = [
    "FORMAT",
    "MANIFEST_FILE",
    "PLAN_FILE",
    "ShardRecord",
    "StageManifest",
    "StagePlan",
    "TensorRecord",
    "read_manifest",
    "read_plan",
    "refuse_other_format",
    "refuse_other_spec",
    "stage_path",
    "write_manifest",
    "write_plan",
]

FORMAT = 1  # raised whenever an older reader would misread what is written
PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What is decided before the first row is computed. A resume reuses ``shard_rows`` and ``fixed`` as they are."""

    name: str
    fingerprint: str  # of ``spec``
    spec: dict[str, Any]  # everything that determines the numbers
    rows_digest: str  # which rows, in which order
    num_rows: int
    shard_rows: int
    fixed: dict[str, Any] = field(default_factory=dict)  # decided once, and outside the fingerprint

    @property
    def num_shards(self) -> int:
        """Files that make the stage whole."""
        return -(-self.num_rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row of ``shard`` and the row after its last."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} does not exist; there are {self.num_shards}")
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows)

    def shard_file(self, shard: int) -> str:
        """Name of the shard's file inside the stage folder."""
        return f"shard-{shard:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One stored column: its element type (safetensors spelling) and the shape of one row.

    Rows of a ragged column are vectors of any length; their ``row_shape`` is empty.
    """

    dtype: str
    row_shape: tuple[int, ...]
    ragged: bool


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One file of the stage and the digest of all it says."""

    file: str
    start: int
    stop: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class StageManifest:
    """A finished stage. Its existence is what says that the stage is complete."""

    plan: StagePlan
    tensors: dict[str, TensorRecord]
    shards: tuple[ShardRecord, ...]
    versions: dict[str, str]


def stage_path(root: Path, name: str, spec: Mapping[str, Any]) -> Path:
    """Folder of the stage ``name`` that is made from ``spec``: ``root/name-<first 12 digits of the fingerprint>``."""
    return Path(root) / f"{name}-{fingerprint(spec)[:12]}"


def refuse_other_spec(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, where: Path | str, advice: str) -> None:
    """Do nothing if both say the same.

    Args:
        stored: what lies on disk was made from.
        wanted: what it would have to be made from.
        where: the folder or file, for the message.
        advice: what the user can do about it, the end of the sentence.

    Raises:
        StoreMismatch: they differ; the message has the first differing field by its dotted path, and both values.
    """
    difference = first_difference(stored, wanted)
    if difference is None:
        return
    path, old, new = difference
    raise StoreMismatch(f"{where} was made with {path}={_shown(old)}, now {path}={_shown(new)} is asked for; {advice}")


def write_plan(folder: Path, plan: StagePlan) -> bool:
    """Put ``plan.json`` in place unless there is one; the first of several processes wins."""
    return create_atomically(folder / PLAN_FILE, [_sealed(_plan_fields(plan))])


def read_plan(folder: Path) -> StagePlan | None:
    """The plan of the stage in ``folder``, None if nothing has been planned there.

    Raises:
        StoreCorrupted: the file is not what was written.
        Unsupported: it is of another format version.
    """
    fields = _unsealed(folder / PLAN_FILE)
    return None if fields is None else _plan_of(fields)


def write_manifest(folder: Path, manifest: StageManifest) -> None:
    """Put ``manifest.json`` in place: from here on the stage counts as complete."""
    fields = _plan_fields(manifest.plan)
    fields["tensors"] = {name: asdict(record) for name, record in manifest.tensors.items()}
    fields["shards"] = [asdict(record) for record in manifest.shards]
    fields["versions"] = manifest.versions
    replace_atomically(folder / MANIFEST_FILE, [_sealed(fields)])


def read_manifest(folder: Path) -> StageManifest | None:
    """The manifest of the stage in ``folder``, None if the stage is not complete.

    Raises:
        StoreCorrupted: the file is not what was written.
        Unsupported: it is of another format version.
    """
    fields = _unsealed(folder / MANIFEST_FILE)
    if fields is None:
        return None
    tensors = {
        name: TensorRecord(dtype=t["dtype"], row_shape=tuple(t["row_shape"]), ragged=t["ragged"])
        for name, t in fields["tensors"].items()
    }
    shards = tuple(ShardRecord(**record) for record in fields["shards"])
    return StageManifest(plan=_plan_of(fields), tensors=tensors, shards=shards, versions=fields["versions"])


def refuse_other_format(found: object, path: Path) -> None:
    """Only one format version is read.

    Raises:
        Unsupported: ``found`` is another one.
    """
    if found != FORMAT:
        raise Unsupported(
            f"{path} has store format {found!r}, this version reads format {FORMAT}; "
            "use the version of tamis that wrote it, or delete the folder and run again to recompute"
        )


def _plan_fields(plan: StagePlan) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(plan)}


def _plan_of(fields: Mapping[str, Any]) -> StagePlan:
    names = ("name", "fingerprint", "spec", "rows_digest", "num_rows", "shard_rows", "fixed")
    return StagePlan(**{name: fields[name] for name in names})


def _sealed(fields: Mapping[str, Any]) -> bytes:
    return _readable({**fields, "sha256": fingerprint(fields)})


def _readable(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _unsealed(path: Path) -> dict[str, Any] | None:
    with disk_errors(path, doing="read"):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        fields = json.loads(content)
        seal = fields.pop("sha256")
        # Bytes are compared too: JSON has many spellings of one value, and we wrote only one of them.
        intact = _sealed(fields) == content and isinstance(seal, str)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact, fields = False, {}
    if not intact:
        raise StoreCorrupted(
            f"{path} is not what was written (its checksum does not match); "
            f"delete the folder {path.parent} and run again to recompute"
        )
    refuse_other_format(fields.get("format"), path)
    return dict(fields)


def _shown(value: Any) -> str:
    if value == "(absent)":
        return "(absent)"
    text = canonical_json(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
