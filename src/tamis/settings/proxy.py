"""What a user can ask of ``tamis proxy``, and the recipes that a preset stands for. No disk, no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from tamis.errors import InvalidSettings
from tamis.notation import PROXY_SUMMARIES
from tamis.settings.checks import check_above_zero, check_at_least, check_sources, check_targets
from tamis.settings.shared import Dtype, SharedSettings
from tamis.values import nearest

__all__ = ["SWEEP", "ProxySettings", "Recipe", "recipe_of"]

Form = Literal["probe", "dense", "core"]
Weighting = Literal["influence", "inverse"]
Gauge = Literal["balanced", "weighted"]
Allocation = Literal["uniform", "share"]
Space = Literal["product", "factors"]
Objective = Literal["none", "kl", "align", "align+kl"]
Damping = Literal["relative", "absolute"]

SWEEP = (0.1, 0.3, 0.5, 0.7, 0.9)  # sparsities whose retention before alignment a build also measures


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How layers are compressed and aligned, every choice made; one per preset, changed by single settings."""

    form: Form = "probe"
    weighting: Weighting = "influence"
    weigh_input: bool = True
    weigh_output: bool = True
    damping: Damping = "relative"
    damping_input: float | None = None  # None: .01, .1 or 1 by how many tokens there are for each input
    damping_output: float = 1.0
    gauge: Gauge = "balanced"
    allocation: Allocation = "uniform"
    space: Space = "product"
    objective: Objective = "kl"
    kl_weight: float = 0.1  # of "align+kl"


_RECIPES: Mapping[str, Recipe] = {
    "default": Recipe(),
    "ipsvd": Recipe(damping_input=0.01, damping_output=0.01),
    "activation": Recipe(weigh_output=False),
    "svd": Recipe(weigh_input=False, weigh_output=False),
    # As published: the core form of appendix F, damped by the same absolute number on both sides, in the gauge in
    # which equation 14 leaves the factors, aligned by gradients anchored by outputs, with influence over the factors.
    "paper": Recipe(
        form="core",
        damping="absolute",
        damping_input=1e-3,
        damping_output=1e-3,
        gauge="weighted",
        space="factors",
        objective="align+kl",
    ),
}
_INVERSE_DAMPING = 0.1
_NEEDS_SIBLING = ("sibling", "influence-scorer")

# Settings of stages that a baseline does not have. One that differs from its default was meant for another preset.
_OF_TRAINING = ("learning_rate", "temperature", "measure_steps", "patience", "validation_rows")
_OF_STEPS = ("steps", "update_rows")
_OF_TOKENS = ("probe_tokens", "probe_gb")
_UNREAD = {
    "layer-extraction": (*_OF_TRAINING, *_OF_STEPS, *_OF_TOKENS),
    "sibling": (*_OF_TRAINING, *_OF_STEPS, *_OF_TOKENS, "probe_rows", "sparsity"),
    # Its head is fitted to --steps times --update-rows rows.
    "influence-scorer": (*_OF_TRAINING, *_OF_TOKENS, "probe_rows", "sparsity"),
}


@dataclass(frozen=True, kw_only=True)
class ProxySettings(SharedSettings):
    """Everything that determines a proxy. ``tamis proxy`` and ``tamis.proxy`` share it.

    Raises:
        InvalidSettings: a value is of the wrong type, out of its range, or contradicts another one.
    """

    model: str
    pool: tuple[str, ...]
    target: tuple[str, ...] = ()  # rows whose ranking of the pool must survive; none: rows of the pool stand in
    sparsity: float = 0.5  # share of the compressed layers' numbers that is removed
    out: str = "tamis-proxy"
    preset: str = "default"
    sibling: str | None = None  # the smaller model of the presets "sibling" and "influence-scorer"
    form: Form | None = None  # this and the following: None means the preset's
    weighting: Weighting | None = None
    damping: Damping | None = None
    damping_input: float | None = None
    damping_output: float | None = None
    gauge: Gauge | None = None
    allocation: Allocation | None = None
    space: Space | None = None
    objective: Objective | None = None
    kl_weight: float | None = None
    probe_rows: int = 128
    probe_tokens: int = 64  # tokens drawn from each of them; shorter rows give all
    probe_gb: float = 4.0  # bound on the probes held at once; less means more passes over the probe rows
    steps: int = 100  # of alignment
    update_rows: int = 8  # of one such step
    learning_rate: float | None = None  # None: 1e-3 for hidden sizes up to 256, 1e-4 above
    temperature: float = 1.0
    measure_steps: int = 50  # steps between measurements on rows kept for that
    patience: int = 2  # measurements without a better one after which alignment stops
    control: bool = True  # with "align" and "align+kl": also align a copy by outputs alone, for as long
    held_out_rows: int = 200
    validation_rows: int = 64
    target_rows: int = 32  # without a target: pool rows that stand in for one
    keep: float = 0.9  # rank correlation that the recommended sparsity must keep
    sweep: bool = True
    projection_dim: int = 16
    seed: int = 0
    batch_tokens: int | None = None  # padded tokens of one pass; None: 2,048 on a CPU, 16,384 on an accelerator
    dtype: Dtype = "auto"  # auto: float32
    attention: str = "sdpa"
    report: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources("pool", self.pool)
        check_targets(self.target, required=False)
        if self.preset not in PROXY_SUMMARIES:
            raise InvalidSettings(
                f"preset={self.preset!r}: expected one of {', '.join(PROXY_SUMMARIES)}"
                f"{nearest(self.preset, PROXY_SUMMARIES)}"
            )
        self._check_numbers()
        if self.target and self._changed(("target_rows",)):
            raise InvalidSettings(
                f"target_rows={self.target_rows}: counts pool rows that stand in for a target; leave it out, or leave "
                "the target out"
            )
        self._check_baseline()
        if self.is_low_rank:
            self._check_recipe(recipe_of(self))

    @property
    def is_low_rank(self) -> bool:
        """Whether layers are factored, and not blocks left out or another model taken."""
        return self.preset in _RECIPES

    def _check_numbers(self) -> None:
        if not 0 < self.sparsity < 1:
            raise InvalidSettings(f"sparsity={self.sparsity}: expected a share above 0 and below 1, such as 0.5")
        if not 0 < self.keep <= 1:
            raise InvalidSettings(f"keep={self.keep}: expected a rank correlation above 0 and at most 1")
        check_above_zero(self, "learning_rate", "temperature", "probe_gb")
        check_at_least(self, 0, "damping_input", "damping_output", "kl_weight", "steps", "seed")
        check_at_least(self, 1, "probe_rows", "probe_tokens", "update_rows", "measure_steps", "patience")
        check_at_least(self, 1, "projection_dim", "target_rows", "batch_tokens")
        check_at_least(self, 8, "validation_rows")
        check_at_least(self, 20, "held_out_rows")

    def _check_baseline(self) -> None:
        if self.preset in _NEEDS_SIBLING and self.sibling is None:
            raise InvalidSettings(f"preset={self.preset!r} takes a smaller model of the family; pass --sibling MODEL")
        if self.preset not in _NEEDS_SIBLING and self.sibling is not None:
            raise InvalidSettings(f"sibling: only the presets {' and '.join(_NEEDS_SIBLING)} take one; leave it out")
        if self.preset == "influence-scorer" and not self.target:
            raise InvalidSettings("preset='influence-scorer' learns the scores for a target; pass --target")
        if not self.is_low_rank:
            changed = [entry.name for entry in fields(Recipe) if getattr(self, entry.name, None) is not None]
            if changed:
                raise InvalidSettings(f"{changed[0]}: the preset {self.preset!r} factors no layer; leave it out")
            for name in self._changed(_UNREAD[self.preset]):
                raise InvalidSettings(
                    f"{name}={getattr(self, name)}: the preset {self.preset!r} does not read it; leave it out"
                )
            if self.preset == "influence-scorer" and self.steps == 0:
                raise InvalidSettings(
                    "steps=0: the preset 'influence-scorer' fits its head to --steps times --update-rows rows; "
                    "expected at least 1"
                )

    def _changed(self, names: Sequence[str]) -> list[str]:
        defaults = {entry.name: entry.default for entry in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def aligns(self) -> bool:
        """Whether factors are trained after they are found."""
        return self.is_low_rank and self.steps > 0 and recipe_of(self).objective != "none"

    def _check_recipe(self, recipe: Recipe) -> None:
        """Refuse what the recipe would not read, and dampings that mean nothing."""
        sides = (("damping_input", recipe.weigh_input), ("damping_output", recipe.weigh_output))
        unread = [name for name, weighs in sides if not weighs]
        if len(unread) == len(sides):
            unread += ["form", "damping", "weighting"]
        for name in unread + (self._changed(_OF_TOKENS) if len(unread) > 1 else []):
            if getattr(self, name) is not None:
                raise InvalidSettings(f"{name}: the preset {self.preset!r} does not weigh by it; leave it out")
        if self.kl_weight is not None and recipe.objective != "align+kl":
            raise InvalidSettings(
                f"kl_weight: only objective='align+kl' reads it, not {recipe.objective!r}; leave it out"
            )
        if not self.aligns:
            why = "steps=0" if self.steps == 0 else "objective='none'"
            for name in self._changed((*_OF_TRAINING, "update_rows", *(() if self.steps == 0 else ("steps",)))):
                raise InvalidSettings(
                    f"{name}={getattr(self, name)}: {why} trains nothing, so nothing reads it; leave it out"
                )
        read = [name for name, weighs in sides if weighs]
        missing = [name for name in read if getattr(self, name) is None]
        if missing and self.damping == "absolute" and _RECIPES[self.preset].damping == "relative":
            raise InvalidSettings(
                f"damping='absolute': the preset {self.preset!r} damps relatively, and its numbers mean nothing as "
                f"absolute ones; pass {' and '.join(missing)}, too"
            )
        for name in read:
            if recipe.weighting == "inverse" and getattr(recipe, name) == 0:
                raise InvalidSettings(
                    f"{name}=0 with weighting='inverse': directions without a probe would weigh infinitely; pass a "
                    "number above zero, such as 0.1"
                )


def recipe_of(settings: ProxySettings) -> Recipe:
    """The preset's recipe with the single settings in place."""
    chosen: dict[str, Any] = {
        entry.name: value for entry in fields(Recipe) if (value := getattr(settings, entry.name, None)) is not None
    }
    recipe = _RECIPES[settings.preset]
    if settings.weighting == "inverse" and settings.damping != "absolute" and recipe.damping == "relative":
        # Inverse moments blow up just those directions that the probes did not measure.
        chosen = {"damping_input": _INVERSE_DAMPING, "damping_output": _INVERSE_DAMPING, **chosen}
    return replace(recipe, **chosen)
