"""The selection methods as Python objects: ``tamis.select(..., method=tamis.methods.Less(lora_rank=16))``."""

from tamis.score import METHODS
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

__all__ = [
    "METHODS",
    "AdamwInfluence",
    "Bm25",
    "InfluenceDistillation",
    "InfluenceFunction",
    "Length",
    "Less",
    "LossDrop",
    "MidPpl",
    "RdsPlus",
    "TracIn",
    "Uniform",
]
