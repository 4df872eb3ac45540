"""The trainer of a run that owns a folder."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from tamis.online.run_trainer import rate_share


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize(("total", "rising"), [(10, 3), (7, 1), (40, 10)])
def test_no_update_is_wasted_on_a_rate_of_zero(kind: str, total: int, rising: int) -> None:
    share = rate_share(kind, total, rising)
    rates = [share(step) for step in range(total)]
    assert rates[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)], rel=1e-12)
    assert rates[rising - 1] == max(rates) == 1 and min(rates) > 0
    assert rates[rising - 1 :] == sorted(rates[rising - 1 :], reverse=True)


def test_the_way_down_is_that_of_transformers() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=11)
    share = rate_share("cosine", 10, 3)
    for step in range(10):
        optimizer.step()
        theirs.step()
        assert theirs.get_last_lr() == pytest.approx([share(step)], rel=1e-12)
