"""A proxy from top to bottom: claim, read, draw rows, load, build, align, measure, write.

The folder is the proxy's and a run's at once: a killed build goes on where it was, a finished one says so. What only
the build needed lies in ``store`` and is removed at the end.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn

from tamis.config import write_config
from tamis.data.examples import Examples, read_examples
from tamis.data.render import Renderer
from tamis.data.row_warnings import bad_row_warnings, row_warnings
from tamis.data.rows import Rows
from tamis.disk import check_writable, make_folder, replace_atomically
from tamis.errors import InvalidSettings, TamisError, Unsupported
from tamis.identity import file_sha256, text_sha256
from tamis.model.limits import model_limits
from tamis.model.load import (
    LoadedModel,
    ModelSettings,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolved_dtype,
    template_sha256,
)
from tamis.model.low_rank_linear import low_rank_layers
from tamis.model.memory import default_batch_tokens
from tamis.model.processes import world_size
from tamis.model.proxy_folder import PROXY_FILE
from tamis.model.targets import input_embeddings, is_tied, output_embeddings
from tamis.notation import target_parts
from tamis.progress import NoProgress
from tamis.projection.factorized import FactorizedProjector
from tamis.protocols import Progress
from tamis.proxies.baselines import build_extraction, build_scorer, build_sibling
from tamis.proxies.bench import Bench
from tamis.proxies.build import build_low_rank
from tamis.proxies.retention import Retention
from tamis.proxies.rows import RowSizes, assign_roles, usable_rows
from tamis.report.document import write_document
from tamis.report.retention import retention_document
from tamis.runs.manifest import base_identity, identity_settings, repeat_command
from tamis.runs.outputs import check_claim, check_files, claim_folder, free_claim, read_written, write_json
from tamis.settings import ProxySettings
from tamis.types import Example
from tamis.values import to_dict
from tamis.versions import versions

__all__ = ["ProxyResult", "prepare", "proxy_from_settings", "read_rows"]

logger = logging.getLogger(__name__)

# Settings that cannot change the weights or a score; all others make a folder the folder of one proxy.
_FREE_SETTINGS = ("out", "report", "on_bad_row", "keep")
_KNOWN_BY_CONTENT = ("model", "revision", "chat_template", "sibling")
# Settings that are read when the factors are there, and change no row that made them.
_AFTER_FACTORS = ("learning_rate", "temperature", "kl_weight", "measure_steps", "patience", "control")
_MADE_BY = "made-by.txt"
_NO_PART_OF_A_PROXY = {"identity.json", "run.yaml", "store"}


@dataclass(frozen=True, kw_only=True)
class ProxyResult:
    """What was built, also on disk under ``out``, which loads wherever a model is taken."""

    out: Path  # folder of the proxy, which is a model folder
    retention: Mapping[str, Any]  # how far the proxy ranks rows as the model does, and the advice, as in retention.json
    warnings: tuple[str, ...]  # what to know before selecting with it
    manifest: Mapping[str, Any]  # what determined the result and what it cost, as manifest.json
    was_finished: bool  # the folder had a finished build: this call built nothing

    def summary(self) -> dict[str, Any]:
        """The result in a few plain values, as ``tamis proxy --json`` prints it."""
        found = self.retention
        final, cost = found["final"], found["cost"]
        report = self.out / "report.html"
        return {
            "preset": found["preset"],
            "was_finished": self.was_finished,
            "sparsity": {key: found[key] for key in ("sparsity", "achieved", "achieved_whole")},
            "parameters": {"full": cost["params_full"], "proxy": cost["params_proxy"]},
            "loss": {"full": found["loss_full"], "proxy": final["loss"]},
            "ranking_kept": final["agreement"]["spearman"],
            "top_5_percent_kept": final["agreement"]["top_overlap"],
            "cost_ratio": {"block_flops": found["flops_ratio"], "seconds": found["seconds_ratio"]},
            "built_for": {
                "seconds": cost["build_seconds"] + cost["align_seconds"],
                "of_a_pool_pass": found["build_share"],
            },
            "left_out": [f"{entry['layers']}: {entry['reason']}" for entry in found["left_out"]],
            "advice": " ".join(found["advice"]["sentences"]),
            "warnings": list(self.warnings),
            "proxy": str(self.out),
            "report": str(report) if report.exists() else None,
        }


def proxy_from_settings(
    settings: ProxySettings, *, progress: Progress | None = None, held: Mapping[str, Rows] | None = None
) -> ProxyResult:
    """The build that ``settings`` describe; see ``tamis.proxy``. ``held`` has the rows in memory that they name."""
    held, progress = held or {}, progress or NoProgress()
    out = Path(settings.out)
    if world_size() > 1:
        raise InvalidSettings(
            f"a proxy is built by one process, and {world_size()} were started; run it without a launcher (its folder "
            "then loads on any number of them)"
        )
    check_writable(out)
    loading = _loading(settings)
    resolved_dtype(loading)  # refuses a device that is not there
    pool, target = read_rows(settings, held)
    identity = _identity(settings, loading, pool, target)
    claim_folder(out, identity)
    write_config("proxy", settings, out / "run.yaml", held=list(held))
    if (out / "manifest.json").is_file():
        logger.info("%s holds this proxy already, finished; nothing is built again", out)
        shutil.rmtree(out / "store", ignore_errors=True)
        _advise_again(settings, out, held)
        return _result(out, was_finished=True)

    try:
        loaded, bench, warnings = prepare(settings, pool, target)
        for sentence in warnings:  # now, and not after hours
            logger.warning("%s", sentence)
        if settings.is_low_rank:
            _keep_of(out / "store", identity)
        retention = _build(settings, loaded, bench, pool, out, progress, warnings)
    except TamisError:
        # Beside parts of a proxy, from a disk that was full, the claim says whose they are and lets the build go on.
        if {path.name for path in out.iterdir()} <= _NO_PART_OF_A_PROXY:
            free_claim(out, identity)
        raise
    check_claim(out, identity)
    manifest = {
        **identity,
        "command": repeat_command("proxy", out, held),
        "versions": versions(),
        "settings": to_dict(settings),
        "models": [loaded.description],
        "warnings": warnings,
        "files": {path.name: file_sha256(path) for path in sorted(out.iterdir()) if _is_part(path)},
    }
    _write_retention(retention, manifest, out, has_page=settings.report)
    write_json(out / "manifest.json", manifest)  # last: its presence says that the proxy is complete
    shutil.rmtree(out / "store", ignore_errors=True)
    return _result(out, was_finished=False)


def _is_part(path: Path) -> bool:
    """Whether a file is one without which the proxy would be none, or another one."""
    return path.suffix in (".safetensors", ".parquet") or path.name in ("config.json", PROXY_FILE)


def _keep_of(store: Path, identity: Mapping[str, Any]) -> None:
    """Leave of a refused build's ``store`` what this build would make again, such as factors after a wrong rate."""
    settings = {name: value for name, value in identity["settings"].items() if name not in _AFTER_FACTORS}
    stages = {"layers": {**identity, "settings": settings}, "alignment": identity, "control": identity}
    for name, made_by in stages.items():
        wanted = text_sha256(json.dumps(made_by, sort_keys=True, default=str))
        mark = store / name / _MADE_BY
        if not mark.is_file() or mark.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(store / name, ignore_errors=True)
            make_folder(store / name)
            replace_atomically(mark, (wanted.encode(),))


def _write_retention(retention: Retention, manifest: Mapping[str, Any], out: Path, *, has_page: bool) -> None:
    if has_page:
        write_document(retention_document(retention, manifest), out / "report.html")
    write_json(out / "retention.json", retention.to_json())  # last: what it advises, the page advises too


def _advise_again(settings: ProxySettings, out: Path, held: Mapping[str, Rows]) -> None:
    """Bring a finished folder's advice and page to what this call wants of them; nothing is measured again."""
    todo = _build_again(out)
    manifest = read_written(out / "manifest.json", todo=todo)
    check_files(out, manifest["files"], todo=todo)
    found = Retention.from_json(read_written(out / "retention.json", todo=todo))
    if found.advice.keep == settings.keep and ((out / "report.html").exists() or not settings.report):
        return
    manifest |= {"command": repeat_command("proxy", out, held), "settings": to_dict(settings)}
    _write_retention(replace(found, advice=found.advised(settings.keep)), manifest, out, has_page=settings.report)


def read_rows(settings: ProxySettings, held: Mapping[str, Rows] | None = None) -> tuple[Examples, Examples | None]:
    """The pool's rows and the target's, None without a target.

    Raises:
        BadRow: a row cannot be used and ``on_bad_row`` is "fail".
        InvalidInput: a file cannot be used.
    """
    how: dict[str, Any] = {"row_format": settings.row_format, "on_bad_row": settings.on_bad_row, "held": held}
    pool = read_examples(settings.pool, **how)
    if not settings.target:
        return pool, None
    return pool, read_examples([target_parts(text)[1] for text in settings.target], **how)


def prepare(settings: ProxySettings, pool: Examples, target: Examples | None) -> tuple[LoadedModel, Bench, list[str]]:
    """The model, the bench with every row's role, and what to warn of.

    Raises:
        InvalidInput: there are too few rows, or the model cannot be read.
        InvalidSettings: the model is a proxy already.
    """
    loading = _loading(settings)
    names = [target_parts(text)[0] for text in settings.target]
    groups = {name: _of_target(target, index) for index, name in enumerate(names)} if target is not None else {}
    renderer = Renderer(load_tokenizer(loading), max_length=settings.max_length)
    roles = assign_roles(
        pool, groups, renderer, sizes=_sizes(settings), seed=settings.seed, on_bad_row=settings.on_bad_row
    )
    warnings = [*renderer.notes]
    for kind, examples in (("pool", pool), ("target", target)):
        if examples is not None:
            bad = [f"{row.file}, row {row.row} (0-based): {row.problem}" for row in examples.skipped]
            warnings += [*bad_row_warnings(bad, kind), *row_warnings(examples, renderer, kind)]
    warnings += roles.check_rows(model_limits(loading), load_tokenizer(loading))
    loaded = _load(loading)
    bench = Bench(
        roles=roles,
        projector=FactorizedProjector(dim=settings.projection_dim, seed=settings.seed),
        batch_tokens=settings.batch_tokens or default_batch_tokens(loaded.device),
        pad_id=loaded.pad_id,
        seed=settings.seed,
    )
    return loaded, bench, warnings


def _build(
    settings: ProxySettings,
    loaded: LoadedModel,
    bench: Bench,
    pool: Examples,
    out: Path,
    progress: Progress,
    warnings: list[str],
) -> Retention:
    """What ``settings.preset`` builds; ``warnings`` grow by those of the sibling."""
    if settings.is_low_rank:
        return build_low_rank(loaded, settings, bench, work=out / "store", out=out, progress=progress)
    if settings.preset == "layer-extraction":
        return build_extraction(loaded, settings, bench, out=out)
    loading = replace(_loading(settings), name=cast(str, settings.sibling), revision=None)
    tokenizer = load_tokenizer(loading)
    renderer = Renderer(tokenizer, max_length=settings.max_length)
    roles, rows = bench.roles.rendered_by(renderer), None
    if settings.preset == "influence-scorer":
        rows = list(usable_rows(pool, renderer, settings.on_bad_row))
    given = None if rows is None else [row for _, row in rows]
    for sentence in roles.check_rows(model_limits(loading), tokenizer, pool=given):
        logger.warning("%s", sentence)
        warnings.append(sentence)
    sibling = _load(loading)
    if rows is None:
        return build_sibling(loaded, sibling, roles, settings, bench, out=out)
    return build_scorer(loaded, sibling, roles, settings, bench, pool=rows, out=out, progress=progress)


def _loading(settings: ProxySettings) -> ModelSettings:
    return ModelSettings(
        name=settings.model,
        revision=settings.revision,
        # Factors are found and aligned in float32; the folder then runs in whatever type it is loaded in.
        dtype="float32" if settings.dtype == "auto" else settings.dtype,
        device=settings.device,
        attention=settings.attention,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template,
    )


def _load(loading: ModelSettings) -> LoadedModel:
    """The model whole: an adapter is merged into its base, because factors are of what the model computes.

    Raises:
        InvalidSettings: the model is a proxy.
        Unsupported: merging would change what the model computes.
    """
    loaded = load_model(loading)
    if low_rank_layers(loaded.model):
        raise InvalidSettings(f"'{loading.name}' is a proxy already; build from the model that it was made of")
    if isinstance(loaded.model, PeftModel):
        _check_mergeable(loaded.model, loading.name)
        model = cast(Any, loaded.model).merge_and_unload()
        if not is_tied(model):  # an adapter may bring a head of its own, which Transformers 4 would tie when it loads
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        loaded.model = cast(nn.Module, model)
        loaded.description["merged_adapter"] = True
    for param in loaded.model.parameters():
        param.requires_grad_(True)
    return loaded


def _check_mergeable(model: PeftModel, name: str) -> None:
    """Refuse LoRA on one use of a matrix that has two: merged, it would change both."""
    if not is_tied(model):
        return
    ends = {id(input_embeddings(model)), id(output_embeddings(model))}
    for layer, module in model.get_base_model().named_modules():
        if id(module) in ends and hasattr(module, "lora_A"):
            raise Unsupported(
                f"adapter '{name}' has LoRA on '{layer}', and the base model has one matrix as embedding and as LM "
                "head, so merging would change both; train the adapter without that layer, or merge it into a base "
                "whose matrices are apart (tie_word_embeddings=False)"
            )


def _of_target(target: Examples | None, index: int) -> list[Example]:
    assert target is not None
    return [example for example, file in zip(target, target.file_index, strict=True) if target.named_by[file] == index]


def _sizes(settings: ProxySettings) -> RowSizes:
    is_scorer = settings.preset == "influence-scorer"
    return RowSizes(
        held_out=settings.held_out_rows,
        validation=settings.validation_rows,
        stand_ins=settings.target_rows,
        probe=settings.probe_rows,
        align=settings.steps * settings.update_rows if settings.aligns or is_scorer else 0,
    )


def _identity(
    settings: ProxySettings, loading: ModelSettings, pool: Examples, target: Examples | None
) -> dict[str, Any]:
    plain = identity_settings(settings, (*_FREE_SETTINGS, *_KNOWN_BY_CONTENT))
    inputs = {}
    if settings.chat_template is not None:
        inputs["chat_template"] = template_sha256(settings.chat_template)
    if settings.sibling is not None:
        inputs["sibling"] = model_fingerprint(replace(loading, name=settings.sibling, revision=None))
    data = {"pool": pool.identity, **({"target": target.identity} if target is not None else {})}
    base = base_identity(verb="proxy", model=model_fingerprint(loading), data=data)
    return {**base, "settings": plain, "inputs": inputs}


def _build_again(out: Path) -> str:
    return f"delete {out / 'manifest.json'} and run the same command again, which builds the proxy anew"


def _result(out: Path, *, was_finished: bool) -> ProxyResult:
    manifest = read_written(out / "manifest.json", todo=_build_again(out))
    return ProxyResult(
        out=out,
        retention=read_written(out / "retention.json", todo=_build_again(out)),
        warnings=tuple(manifest["warnings"]),
        manifest=manifest,
        was_finished=was_finished,
    )
