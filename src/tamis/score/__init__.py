"""The methods, by the name a user types. Adding one is adding its file here and its line below."""

from __future__ import annotations

from tamis.score.adamw_influence import AdamwInfluence
from tamis.score.influence_distillation import InfluenceDistillation
from tamis.score.influence_function import InfluenceFunction
from tamis.score.length import Length
from tamis.score.less import Less
from tamis.score.lexical import Bm25
from tamis.score.loss_drop import LossDrop
from tamis.score.perplexity import MidPpl
from tamis.score.representation import RdsPlus
from tamis.score.tracin import TracIn
from tamis.score.uniform import Uniform

METHODS = {
    "uniform": Uniform,
    "length": Length,
    "bm25": Bm25,
    "loss-drop": LossDrop,
    "mid-ppl": MidPpl,
    "rds+": RdsPlus,
    "tracin": TracIn,
    "less": Less,
    "influence-function": InfluenceFunction,
    "influence-distillation": InfluenceDistillation,
    "adamw-influence": AdamwInfluence,
}
