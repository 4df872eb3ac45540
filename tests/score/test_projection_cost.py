"""What ``tamis select`` says that gradients cost: the pass, a product per weight matrix, and the projection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tamis
from tiny_run import TinyRun, byte_tokenizer, make_run

BLOCK = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64  # of the tiny Llama: 32 hidden, 64 inner, 2 of 4 heads for keys
NUMEL = 2 * BLOCK
VOCABULARY = 259


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), rows=12)


def spent(run: TinyRun, out: Path, **chosen: Any) -> dict[str, Mapping[str, Any]]:
    """The stages in which gradients are taken, with the squared lengths of their rows."""
    found = tamis.select(
        model=run.model, pool=run.pool, target=run.target, method="tracin", set=chosen, budget=4, out=out, device="cpu",
        report=False,
    )  # fmt: skip
    cost = found.manifest["cost"]
    assert cost["total_tflops"] == pytest.approx(sum(stage["tflops"] for stage in cost["stages"]), rel=1e-9)
    stages = {stage["name"]: stage for stage in cost["stages"] if stage["work"] == "gradient"}
    assert set(stages) == {"gradients-pool", "gradients-target"}
    for name, path in (("pool", run.pool), ("target", run.target)):
        lengths = [tokens_of(json.loads(line)["messages"]) for line in path.read_text().splitlines()]
        assert sum(lengths) == stages[f"gradients-{name}"]["tokens"]
        stages[f"gradients-{name}"]["squared"] = sum(length**2 for length in lengths)
    return stages


def tokens_of(messages: Any) -> int:
    return len(byte_tokenizer().apply_chat_template(messages, return_dict=True)["input_ids"])


def passed(stage: Mapping[str, Any]) -> float:
    """Forward and backward with all weights frozen, by hand; attention's two products cost twice as much backwards."""
    products = 2 * NUMEL * stage["tokens"] + 2 * 32 * VOCABULARY * stage["supervised_tokens"]
    return 2 * products + (1 + 2) * 4 * 2 * 32 * stage["squared"]


@pytest.mark.parametrize("dim", [8, 40])
def test_a_random_projection_costs_its_product_for_every_row_beside_the_rows_gradients(
    run: TinyRun, tmp_path: Path, dim: int
) -> None:
    stages = spent(run, tmp_path / "out", projection="rademacher", projection_dim=dim)
    assert [stage["rows"] for stage in stages.values()] == [4, 12]
    for stage in stages.values():
        projected = 2 * stage["rows"] * NUMEL * dim + 2 * NUMEL * stage["tokens"]
        assert stage["tflops"] * 1e12 == pytest.approx(passed(stage) + projected, rel=1e-9)


def test_factors_cost_two_thin_products_in_place_of_the_gradients(run: TinyRun, tmp_path: Path) -> None:
    shapes = 2 * [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    for stage in spent(run, tmp_path / "out", projection="factorized", projection_dim=2).values():
        thin = sum(2 * outs + 2 * ins + 4 for outs, ins in shapes)
        assert stage["tflops"] * 1e12 == pytest.approx(passed(stage) + 2 * stage["tokens"] * thin, rel=1e-9)
