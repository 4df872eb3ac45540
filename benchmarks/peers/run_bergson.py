"""bergson: ``bergson build`` of the target (mean gradient) and ``bergson score`` of the pool against it, on the fly.

Its own worker functions run unchanged; only its model loader is replaced, by one that hands out the model loaded
before the clock starts. Batches by its token budget (by default 2,048 padded tokens, rows sorted by length), float32,
``loss_reduction="mean"``: the other reduction it offers, the sum over tokens, is another definition. An unprojected
target is built row by row: it holds the whole gradients of all rows of a batch at once, twice.

Variants: ``exact-dot``, ``exact-cosine`` (``unit_normalize``), ``exact-dot-jvp`` (``token_influence="output"``: a
forward-mode derivative along the target gradient, which needs eager attention), ``projected-cosine``
(``projection_dim=16`` per side and module, the size its README uses).
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

from bergson.cli.commands import Build, Score
from bergson.config import IndexConfig, PreprocessConfig, ScoreConfig
from bergson.config.config_io import save_run_config
from bergson.data import load_scores
from bergson.utils.worker_utils import setup_model_and_peft
from datasets import Dataset
from worker import Clock, Rows, Run, inputs, serve

VARIANT, GIVEN = inputs()
COSINE, JVP = VARIANT.endswith("cosine"), VARIANT.endswith("jvp")

# The package exports functions of the same names as these modules.
build_module = importlib.import_module("bergson.build")
score_module = importlib.import_module("bergson.score.score")


def settings(run_path: Path) -> IndexConfig:
    return IndexConfig(
        run_path=str(run_path),
        model=GIVEN["model"],
        precision="fp32",
        loss_reduction="mean",
        token_batch_size=GIVEN["batch_tokens"],
        projection_dim=16 if VARIANT.startswith("projected") else 0,
    )


def dataset(rows: Rows) -> Dataset:
    lengths = [len(ids) for ids in rows.input_ids]
    return Dataset.from_dict({"input_ids": rows.input_ids, "labels": rows.labels, "length": lengths})


def start() -> Run:
    attention = {"attn_implementation": "eager"} if JVP else {}
    loaded = setup_model_and_peft(settings(Path("unused")), **attention)
    for module in (build_module, score_module):
        module.setup_model_and_peft = lambda *_, **__: loaded

    def run(pool: Rows, target: Rows, folder: Path, clock: Clock) -> list[float]:
        pool_data, target_data = dataset(pool), dataset(target)
        clock.start()
        query = settings(folder / "query")
        query.max_batch_size = None if VARIANT.startswith("projected") else 1
        preprocess = PreprocessConfig(unit_normalize=COSINE, aggregation="mean")
        query.partial_run_path.mkdir(parents=True)
        save_run_config(Build(query, preprocess), query.partial_run_path)
        build_module.build_worker(0, 0, 1, query, preprocess, target_data)
        shutil.move(query.partial_run_path, query.run_path)
        clock.mark("target")
        index = settings(folder / "scores")
        preprocess = PreprocessConfig(unit_normalize=COSINE)
        score = ScoreConfig(query_path=query.run_path, token_influence="output" if JVP else "gradient")
        index.partial_run_path.mkdir(parents=True)
        save_run_config(Score(score, index, preprocess), index.partial_run_path)
        work = score_module.output_influence_worker if JVP else score_module.score_worker
        work(0, 0, 1, index, score, preprocess, pool_data)
        clock.mark("pool")
        return [float(value) for value in load_scores(index.partial_run_path)[:][:, 0]]

    return run


if __name__ == "__main__":
    serve(start, GIVEN, ("bergson", "torch", "transformers"))
