"""Where a model's files are, found from what the user typed: hub id, local folder, adapter folder or GGUF file.

Also the fingerprint: equal fingerprints mean equal weights, configuration and tokenizer. No weights are loaded here.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import cached_file, extract_commit_hash

from tamis.errors import InvalidInput, InvalidSettings, Unsupported, first_line
from tamis.identity import file_sha256
from tamis.model.proxy_folder import PROXY_FILE, ProxyLayout, read_layout

__all__ = ["ModelSource", "fingerprint_of", "resolve_source"]

logger = logging.getLogger(__name__)

_MODEL_FILES = ("config.json", "proxy.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.py")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model*")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx", ".json", ".zip", ".tar", ".gz")
_HUB_TIMEOUT_S = 10.0
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "additional_chat_templates/*",
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """One place that weights and a tokenizer are read from; an adapter also has the place of its base."""

    kind: Literal["folder", "hub", "gguf"]
    name: str  # as Transformers takes it: hub id or folder
    revision: str | None = None
    gguf_file: str | None = None  # file name inside the folder
    base: ModelSource | None = None  # set for an adapter

    @property
    def is_adapter(self) -> bool:
        """True if these files hold a PEFT adapter only."""
        return self.base is not None

    def proxy_layout(self) -> ProxyLayout | None:
        """What ``proxy.json`` says, None for a model that is no proxy.

        Raises:
            InvalidInput: the file cannot be used.
        """
        found = None if self.gguf_file is not None else _file(self, PROXY_FILE)
        return None if found is None else read_layout(found)

    def has_tokenizer(self) -> bool:
        """Whether the tokenizer is here; adapters are often saved without."""
        return self.gguf_file is not None or _file(self, "tokenizer_config.json") is not None


def resolve_source(name: str, revision: str | None = None) -> ModelSource:
    """Decide what ``name`` is.

    Raises:
        InvalidInput: nothing is there, or what is there is no model; says what to give instead.
        InvalidSettings: a file or folder is there, and a revision, which only the hub has, is asked for.
        Unsupported: an adapter that is not of PEFT's LoRA kind.
    """
    path = Path(name).expanduser()
    if revision is not None and path.exists():
        raise InvalidSettings(f"revision={revision!r}: model '{name}' is on this disk, and only the hub has revisions")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InvalidInput(f"model '{name}' is a file; give a folder, a hub id or a .gguf file")
        return ModelSource(kind="gguf", name=str(path.parent), gguf_file=path.name)
    if path.is_dir():
        source = ModelSource(kind="folder", name=str(path))
    elif _looks_like_a_path(name):
        raise InvalidInput(f"model '{name}' does not exist; give a folder, a .gguf file or a hub id such as org/name")
    else:
        source = ModelSource(kind="hub", name=name, revision=revision)
    has_config = _file(source, "config.json") is not None
    if _file(source, "adapter_config.json") is not None:
        return replace(source, base=_base_of_adapter(source, name))
    if source.kind == "folder" and not has_config:
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if ggufs:
            raise InvalidInput(f"model folder '{name}' holds GGUF files; give the file itself: {path / ggufs[0]}")
        raise InvalidInput(f"model folder '{name}' has no config.json; save the model there with save_pretrained")
    if not has_config:
        if not _hub_answers(name, revision):
            raise InvalidInput(
                f"model '{name}' is no local folder, is not in the hub's local cache, and the hub cannot be reached; "
                "check the name and the network"
            )
        raise InvalidInput(f"'{name}' on the hub has no config.json, so it is no Transformers model; give another id")
    return source


def fingerprint_of(source: ModelSource) -> str:
    """SHA-256 over what determines the weights, the configuration and the tokenizer.

    Local files by their bytes. Hub files by the commit they come from, which fixes their bytes without reading them.
    """
    digest = hashlib.sha256()
    digest.update(source.kind.encode())
    if source.kind == "hub":
        digest.update(f"{source.name}@{_commit(source)}".encode())
    else:
        for file in _files_that_count(source):
            digest.update(f"\n{file.relative_to(source.name).as_posix()}:{file_sha256(file)}".encode())
    if source.base is not None:
        digest.update(b"\nbase:" + fingerprint_of(source.base).encode())
    return digest.hexdigest()


def _files_that_count(source: ModelSource) -> list[Path]:
    folder = Path(source.name)
    if source.kind == "gguf":
        return [folder / str(source.gguf_file)]
    patterns = _TOKENIZER_FILES + (_ADAPTER_FILES if source.is_adapter else _MODEL_FILES)
    files = {
        file
        for file in folder.rglob("*")
        if file.is_file() and any(fnmatch.fnmatch(file.relative_to(folder).as_posix(), p) for p in patterns)
    }
    return sorted(files)


def _base_of_adapter(source: ModelSource, typed: str) -> ModelSource:
    config = _read_json(source, "adapter_config.json", typed)
    if config.get("peft_type") != "LORA":
        raise Unsupported(f"adapter '{typed}' is of type {config.get('peft_type')!r}; only LORA adapters are supported")
    base = config.get("base_model_name_or_path")
    if not base:
        raise InvalidInput(f"adapter '{typed}' names no base: set base_model_name_or_path in adapter_config.json")
    beside = Path(source.name) / base
    if source.kind == "folder" and not Path(base).expanduser().exists() and beside.exists():
        base = str(beside)  # a relative path, meant from the adapter's own folder
    try:
        return resolve_source(base, None if Path(base).expanduser().exists() else config.get("revision"))
    except InvalidInput as error:
        raise InvalidInput(f"adapter '{typed}' names a base that cannot be read: {error}") from error


def _read_json(source: ModelSource, file: str, typed: str) -> dict[str, Any]:
    path = _file(source, file)
    assert path is not None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInput(f"'{typed}': {file} is not valid JSON ({error}); save the model again") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"'{typed}': {file} must hold a JSON object, found {type(content).__name__}")
    return content


def _file(source: ModelSource, file: str) -> Path | None:
    """A file of the source, fetched from the hub if need be; None if it is not there."""
    if source.kind != "hub":
        path = Path(source.name) / file
        return path if path.is_file() else None
    return _hub_file(source.name, source.revision, file)


@functools.lru_cache(maxsize=256)  # one answer per process: a push to the hub in mid-run must not mix two commits
def _hub_file(name: str, revision: str | None, file: str) -> Path | None:
    try:
        found = cached_file(
            name,
            file,
            revision=revision,
            local_files_only=not _hub_answers(name, revision),
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        at = f" at revision '{revision}'" if revision else ""
        raise InvalidInput(
            f"model '{name}' is neither a local folder nor a model{at} that the hub or its local cache can give "
            f"({first_line(error)}); check the name, the network and your access token"
        ) from error
    return None if found is None else Path(found)


@functools.lru_cache(maxsize=256)
def _hub_answers(name: str, revision: str | None) -> bool:
    """Whether the hub can be asked for this model, in one attempt: its file client tries for a quarter of a minute."""
    try:
        HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S)
    except HfHubHTTPError:  # it answers; what is wrong with the name or the token comes with the first file
        return True
    except Exception as error:  # offline mode, and what the network library of the installed version raises
        logger.info("the hub cannot be reached (%s); only its local cache is used", first_line(error))
        return False
    return True


def _commit(source: ModelSource) -> str:
    file = _file(source, "adapter_config.json" if source.is_adapter else "config.json")
    commit = extract_commit_hash(None if file is None else str(file), None)
    if commit is None:
        raise InvalidInput(
            f"cannot tell which commit of '{source.name}' is in the hub's cache; give --revision or a folder"
        )
    return str(commit)


def _looks_like_a_path(name: str) -> bool:
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or not _is_hub_id(name):
        return True
    # Ids have dots too (Qwen2.5-0.5B), so only endings of files that a model could be kept in speak for a path.
    return name.lower().endswith(_FILE_ENDINGS) or ("/" in name and Path(name).parent.is_dir())


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
