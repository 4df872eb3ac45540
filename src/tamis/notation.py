"""What a user may write: the names of methods and projections, a shortlist, a target, how candidates are scored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from tamis.errors import InvalidSettings
from tamis.values import nearest

__all__ = [
    "GRADIENT_METHODS",
    "METHOD_SUMMARIES",
    "ONLINE_SUMMARIES",
    "PROJECTION_NAMES",
    "PROXY_SUMMARIES",
    "Shortlist",
    "candidates_parts",
    "check_method",
    "check_online_method",
    "check_projection",
    "check_target_name",
    "parse_shortlist",
    "target_parts",
]

# The methods of ``tamis.score.METHODS`` in one line each. They are listed here a second time because that dict
# imports PyTorch, and help and error messages must not wait for it; a test holds the two equal.
METHOD_SUMMARIES: dict[str, str] = {
    "uniform": "a random draw: what every other method has to beat",
    "length": "rows with the most supervised tokens first: shows what length alone explains",
    "bm25": "words shared with the target rows; costs next to nothing and is hard to beat",
    "loss-drop": "relative loss drop of the row after a short warm-up on the target",
    "mid-ppl": "rows of middling perplexity; ignores the target",
    "rds+": "cosine of position-weighted mean hidden states with the target rows",
    "tracin": "gradient cosine with the target rows (the default)",
    "less": "Adam update of the row against the target gradient, over checkpoints of a LoRA warm-up",
    "influence-function": "exact gradients compared through the inverse curvature of the loss (EK-FAC or K-FAC)",
    "influence-distillation": "exact gradients of a few landmark rows, carried to all others by cheap embeddings",
    "adamw-influence": "what each row did to the target along one whole training run (offline)",
}
GRADIENT_METHODS = ("tracin", "less", "influence-function")
# The methods of ``tamis.online.METHODS``, likewise.
ONLINE_SUMMARIES: dict[str, str] = {
    "filter-then-weight": "keeps the candidates that together best match the target's update, then weights them "
    "around 1 (the default)",
    "tilt": "keeps all candidates, weighted by alignment with the target",
    "anchored": "keeps all candidates, weighted by matching the target, pulled towards 1",
    "tracin": "largest inner products with the target's gradient",
    "less": "largest cosines of a candidate's own Adam step with the target's gradient",
    "greats": "greedy by inner products with the target, minus those with candidates already taken",
    "grad-match": "orthogonal matching pursuit of the target's gradient",
    "uniform": "a random draw: what every other method has to beat",
    "full": "plain training on all candidates: what every other method has to beat at equal compute",
    "target-only": "trains on the target rows themselves: a warning, since a small target is memorised",
    "lookahead": "takes what lowers the target loss most k updates later, through AdamW's dynamics (set horizon)",
}
# The presets of ``tamis proxy``.
PROXY_SUMMARIES: dict[str, str] = {
    "default": "influence-preserving factors, weighted fully by inputs, mildly by output gradients; aligned by outputs",
    "ipsvd": "like default, with both sides at full weight (relative damping .01 each)",
    "activation": "factors weighted by the inputs alone",
    "svd": "plain truncated SVD",
    "paper": "IProX as published: core form, absolute damping, gradient alignment, influence over the factors",
    "layer-extraction": "baseline: keeps whole blocks, those that change their input most",
    "sibling": "baseline: a smaller model of the family, unchanged (--sibling)",
    "influence-scorer": "baseline: a head on a smaller model's states, fitted to scores; gives scores, no model",
}
_NOT_IN_NAMES = re.compile(r"[/\\*?\[]")  # of targets: with one of these, what stands before ``=`` is of the path
PROJECTION_NAMES = ("none", "factorized", "rademacher", "hadamard", "mask")


def candidates_parts(text: str) -> tuple[str, str]:
    """How online candidates are scored: ``"reuse:4"`` is ``("reuse", "4")``, ``"exact"`` and ``"jvp"`` have no value.

    ``"sources:8"`` has one like ``reuse``. ``"proxy:PATH"`` names a model; ``"proxy"`` alone stands for one that is
    given as an object.

    Raises:
        InvalidSettings: the text is not of that form, or scores are to be re-used for fewer than two choices.
    """
    kind, colon, value = text.strip().partition(":")
    plain = kind in ("exact", "jvp") and not colon
    named = kind == "proxy" and bool(value.strip()) == bool(colon)
    if plain or named:
        return kind, value.strip()
    least = {"reuse": 2, "sources": 1}.get(kind, 0)
    if least and value.isdecimal() and int(value) >= least:
        return kind, value
    raise InvalidSettings(
        f"candidates={text!r}: expected 'exact', 'reuse:K' with K of 2 or more, 'sources:K', 'jvp', or 'proxy:MODEL'"
    )


@dataclass(frozen=True, kw_only=True)
class Shortlist:
    """Which rows the method scores: those that a cheaper one keeps, or a sample of every source."""

    method: str | None  # the cheap one; None for a sample of sources
    multiple: float = 1.0  # of the budget: what the cheap one keeps
    per_source: int = 0  # rows of each source


def parse_shortlist(text: str) -> Shortlist:
    """``"bm25:5x"`` keeps five times the budget by BM25; ``"sources:8"`` scores 8 random rows of every source.

    Raises:
        InvalidSettings: the text is not of that form, the method is unknown, the multiple is below 1, or no row of a
            source is to be scored.
    """
    match = re.fullmatch(r"([^:]+):(\d+(?:\.\d+)?)(x?)", text.strip())
    if not match:
        raise InvalidSettings(
            f"shortlist={text!r}: expected METHOD:MULTIPLE, for example 'bm25:5x', or 'sources:8', a number of rows "
            "of every source"
        )
    name, number, times = match.groups()
    if name == "sources":
        if times or not number.isdecimal() or int(number) < 2:
            raise InvalidSettings(
                f"shortlist={text!r}: expected a whole number of rows, at least 2, for example 'sources:8'"
            )
        return Shortlist(method=None, per_source=int(number))
    check_method(name, setting="shortlist")
    if float(number) < 1:
        raise InvalidSettings(f"shortlist={text!r}: it must keep at least the budget itself (1x)")
    return Shortlist(method=name, multiple=float(number))


def target_parts(text: str) -> tuple[str, str]:
    """Name and path of a target: ``"maths=data/gsm8k.jsonl"``, or a path whose stem is the name.

    What stands before the first ``=`` is a name if it has no slash; a file with ``=`` in its name is written
    ``./a=b.jsonl``. A glob is named by its stem without the wildcards, or else by its folder.

    Raises:
        InvalidSettings: the name or the path is empty.
    """
    before, equals, after = text.partition("=")
    if equals and not _NOT_IN_NAMES.search(before):
        if not before.strip() or not after.strip():
            raise InvalidSettings(f"target={text!r}: expected a path or NAME=PATH")
        return before.strip(), after.strip()
    if not text.strip():
        raise InvalidSettings("target: expected a path or NAME=PATH, got an empty text")
    path = PurePosixPath(text.strip().replace("\\", "/").split("@")[0].split(":")[-1])
    stem = re.sub(r"[*?\[\]{}]", "", path.stem).strip(" ._-")
    return stem or path.parent.name or text.strip(), text.strip()


def check_target_name(name: str, what: str) -> None:
    """Refuse a name that ``target_parts`` would take for a part of the path.

    Raises:
        InvalidSettings: it is empty, or has a slash, a wildcard or an equals sign.
    """
    if not name.strip() or "=" in name or _NOT_IN_NAMES.search(name):
        raise InvalidSettings(f"{what}: {name!r} cannot be a name; it needs one without / \\ * ? [ and =")


def check_method(name: str, *, setting: str = "method") -> None:
    """Refuse a name that is no method's, under the name of the setting it was given for.

    Raises:
        InvalidSettings: it is not; the nearest known one is suggested.
    """
    if name not in METHOD_SUMMARIES:
        listed = ", ".join(METHOD_SUMMARIES)
        raise InvalidSettings(
            f"{setting}: unknown method {name!r}{nearest(name, METHOD_SUMMARIES)} (methods: {listed})"
        )


def check_online_method(name: str) -> None:
    """Refuse a name that is no online method's.

    Raises:
        InvalidSettings: it is not; the nearest known one is suggested.
    """
    if name not in ONLINE_SUMMARIES:
        listed = ", ".join(ONLINE_SUMMARIES)
        raise InvalidSettings(f"method: unknown method {name!r}{nearest(name, ONLINE_SUMMARIES)} (methods: {listed})")


def check_projection(name: str | None) -> None:
    """Refuse a name that is no projection's; None stands for the method's own.

    Raises:
        InvalidSettings: it is not.
    """
    if name is not None and name not in PROJECTION_NAMES:
        raise InvalidSettings(
            f"projection={name!r}: expected one of {', '.join(PROJECTION_NAMES)}{nearest(name, PROJECTION_NAMES)}"
        )
