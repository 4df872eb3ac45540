"""The online methods, by the name a user types: from what is known of a step's candidates to a choice and its weights.

Pure functions of the evidence, without model, optimizer or randomness. Which inner products a method is given is
stated by its ``needs``. Adding one is adding its file here and its line below.
"""

from __future__ import annotations

from tamis.online.methods.baselines import Full, GradMatch, Greats, Less, TargetOnly, TracIn, Uniform
from tamis.online.methods.choice import Method
from tamis.online.methods.filter_then_weight import FilterThenWeight
from tamis.online.methods.lookahead import Lookahead
from tamis.online.methods.tilt import Anchored, Tilt

METHODS: dict[str, type[Method]] = {
    "filter-then-weight": FilterThenWeight,
    "tilt": Tilt,
    "anchored": Anchored,
    "tracin": TracIn,
    "less": Less,
    "greats": Greats,
    "grad-match": GradMatch,
    "uniform": Uniform,
    "full": Full,
    "target-only": TargetOnly,
    "lookahead": Lookahead,
}
