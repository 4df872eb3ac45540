"""What a user can ask of each verb: one frozen dataclass per verb, checked when it is made.

The command line, a YAML file and Python all end here. Nothing in this room reads a disk or imports PyTorch, so that a
misspelt setting is answered at once.
"""

from tamis.settings.compare import CompareSettings
from tamis.settings.doctor import DoctorSettings
from tamis.settings.plan import PlanSettings
from tamis.settings.proxy import ProxySettings
from tamis.settings.select import SelectSettings
from tamis.settings.shared import LoadingSettings, SharedSettings
from tamis.settings.trace import AttributeSettings, VerifySettings
from tamis.settings.train import TrainRunSettings

__all__ = [
    "AttributeSettings",
    "CompareSettings",
    "DoctorSettings",
    "LoadingSettings",
    "PlanSettings",
    "ProxySettings",
    "SelectSettings",
    "SharedSettings",
    "TrainRunSettings",
    "VerifySettings",
]
