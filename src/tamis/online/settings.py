"""How an online step measures, the same for every method; and which methods can do with cheaper candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tamis.errors import InvalidSettings
from tamis.notation import candidates_parts
from tamis.online.methods.choice import Method
from tamis.values import check_types

__all__ = ["StepSettings", "check_combination"]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step measures and what its gradient is divided by; the same for every method.

    With ``reduction="tokens"`` a row's part of the update is its mean loss's gradient times its supervised tokens, and
    that is what methods are shown: ``b`` once and ``G`` on both sides times the row's tokens over the candidates' mean.
    Cosines, which have no length, stay as they are.

    ``candidates`` says what scoring a candidate costs:

    * ``"exact"``: a forward and a backward pass of the trained model, whose gradients the update is then made of.
    * ``"reuse:K"``: the same, once for K choices. A window of ``keep * oversample`` candidates is scored at the first
      of them; each of the K choices is what the method makes of the kept ``b`` and ``G`` of those rows of the window
      that no earlier one took. Rows taken later run forward and backward then, and no others. A window of which
      nothing usable is left before that is scored anew.
    * ``"sources:K"``: at one choice in K, ``source_rows`` candidates of every source run both ways. Every candidate has
      the mean ``b`` of its source, over all scorings so far, the last counting most (``source_memory``), and is drawn
      with a probability that grows with it (``source_temperature``; the method only says what ``b`` is). Only the
      drawn run otherwise, so candidates cost next to nothing and may be many.
    * ``"jvp"``: a forward pass that carries the derivative of every candidate's loss along ``D * grad t`` (or
      ``grad t``), which is ``b`` exactly. No backward pass and nothing kept for one; the chosen run both after that.
    * ``"proxy:MODEL"``: gradients of another, smaller model with the same vocabulary, at its own fixed weights, of
      candidates and target rows. The trained model runs the chosen alone.

    ``target_rank`` makes alignments cheaper: every matrix of the direction that candidates are compared with,
    ``D * grad t``, is cut to that rank where products with it then take at most half of the operations. A candidate's
    ``b`` costs two narrow products per layer instead of one as large as a weight gradient, which is a third of a pass
    where all weights are trained. Adapters are narrow already. Gradients of such matrices are then always held as
    factors, which takes more memory than the smaller form where rows are long for the width of a layer.

    ``target_every`` and ``target_ema`` make the target gradient cheaper or calmer. Both are off by default: fresh
    target rows at every choice, without averaging, did best wherever that was measured.
    """

    reduction: Literal["rows", "tokens"] = "rows"  # every row counts alike, or every supervised token (as in Trainer)
    gram: Literal["auto", "exact", "sketch"] = "auto"  # pairs; auto: exact up to 8 million numbers trained
    sketch_dim: int = 64  # numbers per side of a layer's sketch
    seed: int = 0  # of sketches
    candidates: str = "exact"  # or "reuse:K", "sources:K", "jvp", "proxy:MODEL", "proxy": a model given to the trainer
    source_rows: int = 2  # of each source, scored at one choice in K of "sources:K"
    source_temperature: float = 0.5  # 0: the best sources; the larger, the more evenly candidates are drawn
    source_memory: float = 0.5  # weight of a score in its source's mean, relative to one of the next scoring
    target_rank: int | None = None  # of every matrix of the target's direction; None: whole
    target_every: int = 1  # choices that a target gradient is used for
    target_ema: float = 0.0  # share of the earlier target gradients in their running mean

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("sketch_dim", "target_rank", "target_every", "source_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidSettings(f"{name}={value}: expected at least 1")
        if not 0 <= self.target_ema < 1:
            raise InvalidSettings(f"target_ema={self.target_ema}: expected at least 0 and below 1")
        if self.source_temperature < 0:
            raise InvalidSettings(f"source_temperature={self.source_temperature}: expected at least 0")
        if not 0 <= self.source_memory <= 1:
            raise InvalidSettings(f"source_memory={self.source_memory}: expected at least 0 and at most 1")
        if self.candidates_kind in ("reuse", "sources", "proxy") and self.target_every > 1:
            raise InvalidSettings(
                f"target_every={self.target_every} with candidates={self.candidates!r}: scores that are re-used look "
                "at the target once anyway, and a proxy's own look is cheap; leave target_every at 1"
            )

        if self.candidates_kind == "proxy" and self.target_ema > 0:
            raise InvalidSettings(
                f"target_ema={self.target_ema:g} with candidates={self.candidates!r}: a proxy looks at the target anew "
                "at every choice and keeps no mean; leave target_ema at 0"
            )

    @property
    def candidates_kind(self) -> str:
        """``exact``, ``reuse``, ``sources``, ``jvp`` or ``proxy``."""
        return candidates_parts(self.candidates)[0]

    @property
    def scored_every(self) -> int:
        """Choices from one scoring of candidates to the next."""
        kind, value = candidates_parts(self.candidates)
        return int(value) if kind in ("reuse", "sources") else 1

    @property
    def reuse(self) -> int:
        """Choices made from one window of candidates."""
        kind, value = candidates_parts(self.candidates)
        return int(value) if kind == "reuse" else 1


def check_combination(method: Method, settings: StepSettings) -> None:
    """Refuse a method that cannot do with the way in which candidates are to be scored.

    Raises:
        InvalidSettings: naming both and what to do.
    """
    kind, needs = settings.candidates_kind, method.needs
    _check_rank(method, settings)
    if needs.alignment is None or needs.target_only:
        cheap = kind != "exact" or settings.target_every > 1 or settings.target_ema > 0
        why = "scores no candidate" if cheap else ""
    elif needs.ahead:
        cheap = kind != "exact" or settings.target_every > 1 or settings.target_ema > 0
        why = "trains ahead on the candidates themselves, and looks at the target where that ends" if cheap else ""
    elif kind == "exact":
        return _check_target(method, settings)
    elif method.keeps_all:
        why = "keeps all candidates, so all of them run through the trained model anyway"
    elif needs.token_level or needs.alignment == "projected":
        why = "is a published form that is measured on the trained model, at every choice"
    elif kind == "reuse" and settings.reuse > method.oversample:
        why = f"keeps {method.keep} of {method.keep * method.oversample} candidates, too few for that many choices"
    elif kind in ("jvp", "sources") and (needs.interactions or needs.lengths) is not None:
        why = "compares candidates with each other, for which their gradients are needed"
    elif kind == "jvp" and needs.alignment not in ("adam", "raw"):
        why = f"asks for alignment={needs.alignment!r}, which is no derivative along one direction"
    elif kind == "proxy" and (needs.reads_adam or needs.adam):
        why = "reads Adam's state, which is the trained model's and says nothing of the proxy's parameters"
    else:
        return _check_target(method, settings)
    if not why:
        return None
    asked = f"candidates={settings.candidates!r}"
    if kind == "exact":
        asked = f"target_every={settings.target_every}, target_ema={settings.target_ema:g}"
    fits = {
        "reuse": "it goes with methods that keep some of the candidates: filter-then-weight, tracin, less, greats, "
        "grad-match",
        "sources": "it goes with tracin, less and filter-then-weight (filter='top', weights='none')",
        "jvp": "it goes with tracin and filter-then-weight (filter='top', weights='none')",
        "proxy": "it goes with tracin, greats, grad-match and filter-then-weight (alignment='raw', interactions='raw')",
        "exact": "leave both at their defaults",
    }[kind]
    raise InvalidSettings(f"{asked}: method '{method.name}' {why}; {fits}")


def _check_rank(method: Method, settings: StepSettings) -> None:
    if settings.target_rank is None:
        return
    needs = method.needs
    if needs.alignment is None or needs.target_only or needs.ahead:
        why = f"method '{method.name}' does not compare candidates with the target"
    elif needs.token_level:
        why = f"method '{method.name}' with token_level=True compares position by position"
    elif needs.alignment not in ("adam", "jacobian", "raw"):
        why = f"method '{method.name}' has alignment={needs.alignment!r}, which is no product with one direction"
    elif settings.candidates_kind == "jvp":
        why = "candidates='jvp' take one derivative along the whole direction, at no cost that its rank would lower"
    else:
        return
    raise InvalidSettings(
        f"target_rank={settings.target_rank}: {why}; leave it out, or take tracin, greats, grad-match, "
        "filter-then-weight, tilt or anchored with candidates scored by gradients"
    )


def _check_target(method: Method, settings: StepSettings) -> None:
    if method.needs.token_level and (settings.target_every > 1 or settings.target_ema > 0):
        raise InvalidSettings(
            f"target_every={settings.target_every}, target_ema={settings.target_ema:g}: a token-level score compares "
            "candidates with the target's rows, position by position, and keeps no mean; leave both at their defaults"
        )
