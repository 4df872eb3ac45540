"""The same seam to TRL's SFTTrainer, which renders chats and prompts itself. TRL is an optional extra."""

from __future__ import annotations

from typing import Any

from tamis.errors import Unsupported
from tamis.online.trainer import OnlineMixin

try:
    from trl import SFTTrainer
except ImportError:

    class SFTTrainer:  # type: ignore[no-redef]
        """Stands where TRL would, so that the module imports without it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise Unsupported("OnlineSFTTrainer needs TRL, which is not installed: pip install 'tamis[trl]'")


__all__ = ["OnlineSFTTrainer"]


class OnlineSFTTrainer(OnlineMixin, SFTTrainer):  # type: ignore[misc]  # trl has no types here
    """``trl.SFTTrainer`` that chooses and weights its training data at every step.

    The target rows go through the same preparation as the training rows. What ``SFTTrainer`` logs from the training
    pass's own outputs (``entropy``, ``mean_token_accuracy``, ``num_tokens``) is logged at evaluation only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._formatting_func = kwargs.get("formatting_func")
        super().__init__(*args, **kwargs)

    def _prepared_target(self, rows: Any) -> Any:
        rows = super()._prepared_target(rows)
        return self._prepare_dataset(rows, self.processing_class, self.args, False, self._formatting_func, "target")
