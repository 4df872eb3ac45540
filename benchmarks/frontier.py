"""How well scores carried from landmarks agree with exact ones, by embedding and number of landmarks, against its cost.

    python benchmarks/frontier.py --model DIR --pool pool.jsonl --target a.jsonl b.jsonl --rows 3072 --csv OUT.csv

Exact (projected) gradients of every row of a sample are taken once, and every embedding of them, each timed. Then, for
each draw of landmarks, embedding, kernel and damping are chosen as `influence-distillation` chooses them, and what it
would say of the other rows is held against the truth. Interrupt it and run it again: it goes on where it was.

Costs are processor seconds per row of this very run. ``cost`` is that of a whole pool of ``--pool-rows`` rows, with the
landmarks and what "auto" tries on them, as a share of exact gradients for all of its rows; the target rows' own
gradients, which every method needs, are in neither.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamis.collect import Collecting, Task
from tamis.corpora import model_settings, read_corpora, read_sources
from tamis.embeddings import Given, HiddenMean, Jvp, Rds, TfIdf
from tamis.gradients.per_sample import per_sample_features
from tamis.maths.similarity import unit_rows
from tamis.model.loss import per_sample_losses
from tamis.progress import NoProgress
from tamis.projection import make_projector
from tamis.score.distillation.candidates import EmbeddingSettings, candidate_embeddings, embeddings_within, label_of
from tamis.score.distillation.choice import COMPARED, Choice, KernelSettings, choose_embedding
from tamis.score.distillation.landmark_gradients import LandmarkGradients
from tamis.score.distillation.row_embeddings import AnyEmbedding, RowBlock, RowEmbeddings
from tamis.seeds import child_seed, random_subset
from tamis.settings import SelectSettings
from tamis.solve.kernel_ridge import fit_kernel_ridge
from tamis.solve.kernels import kernel_matrix
from tamis.solve.leave_one_out import candidate_basis, recovery_cosines, spearman
from tamis.store.reader import StageReader
from tamis.types import Batch, IntArray

FIELDS = (
    "embedding", "chosen", "landmarks", "draw", "recovery", "spearman", "spearman_rows", "top5", "expected_recovery",
    "expected_spearman", "kernel", "damping", "residual", "seconds_per_row", "cost", "rows", "target_rows",
)  # fmt: skip
OWN_KERNELS = KernelSettings(name="auto", scale=None, damping=None, centred=None, half_whitening=False, residual="auto")
# As published: RBF, damping 0.01, the embedding alone. The paper names no bandwidth.
PAPER_KERNELS = KernelSettings(name="rbf", scale=2.0, damping=0.01, centred=False, half_whitening=False, residual=False)
ANY = EmbeddingSettings(
    name="auto", budget=2.0, depth=None, directions=1, positions="mean", combine="mean", side=None, tail_blocks=2,
    given=None,
)  # fmt: skip


class Clock:
    """Processor seconds per row of each stage, kept over interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)
        for line in path.read_text().splitlines() if path.exists() else ():
            known = json.loads(line)
            self._rows[known["stage"]] += known["rows"]
            self._seconds[known["stage"]] += known["seconds"]

    def timed(self, stage: str, function: Callable[[Batch], Mapping[str, Tensor]]) -> Any:
        def run(batch: Batch) -> Mapping[str, Tensor]:
            start = time.process_time()
            found = function(batch)
            self.add(stage, len(batch.rows), time.process_time() - start)
            return found

        return run

    def add(self, stage: str, rows: int, seconds: float) -> None:
        self._rows[stage] += rows
        self._seconds[stage] += seconds
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": stage, "rows": rows, "seconds": round(seconds, 6)}) + "\n")

    def per_row(self, stage: str) -> float:
        return self._seconds[stage] / self._rows[stage]


class Known(RowEmbeddings):
    """Embeddings that are all there already: every reader looks them up."""

    def __init__(self, task: Task, pool: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        super().__init__(task, dtype="float16")
        self._known = {task.pool.name: (pool, task.rows), task.target.name: (target, task.target_rows)}

    def of(self, embedding: AnyEmbedding, corpus: Any, rows: IntArray) -> RowBlock:
        vectors, places = self._known[corpus.name]
        mine = vectors[label_of(embedding)][torch.from_numpy(np.searchsorted(places, rows))]
        return lambda start, stop: mine[start:stop]


def read(reader: StageReader, column: str) -> Tensor:
    return torch.from_numpy(reader.read(column)).float()


def question(options: argparse.Namespace) -> Task:
    """A random sample of the pool against the first rows of every target."""
    settings = SelectSettings(
        model=options.model, pool=(str(options.pool),), target=tuple(map(str, options.target)), dtype=options.dtype,
        attention=options.attention, max_length=options.max_length, out=str(options.out), on_bad_row="skip",
    )  # fmt: skip
    store = options.out / "store"
    corpora = read_corpora(read_sources(settings), settings, store=store, progress=NoProgress())
    usable = np.flatnonzero(corpora.pool.usable)
    rows = usable[random_subset(child_seed(0, "frontier"), len(usable), min(options.rows, len(usable)))]
    few = np.concatenate([np.flatnonzero(corpora.target_group == g)[: options.target_rows] for g in
                          range(len(corpora.target_names))])  # fmt: skip
    return Task(
        pool=corpora.pool, target=corpora.target, target_names=corpora.target_names,
        target_rows=corpora.target_rows[few], target_group=corpora.target_group[few],
        rows=np.sort(rows).astype(np.int64), model_settings=model_settings(settings),
        collecting=Collecting(batch_tokens=options.batch_tokens, shard_rows=64), store=store,
    )  # fmt: skip


def gradients_of(task: Task, clock: Clock, projection: str, dim: int) -> tuple[Tensor, Tensor]:
    """Inner products of the rows' unit gradients, projected: with one another, and with the target rows'."""
    projector = make_projector(projection, dim=dim, seed=0)

    def start() -> Any:
        layers = task.layers()

        def features(batch: Batch) -> dict[str, Tensor]:
            found = per_sample_features(task.loaded.model, batch, layers, projector)[1]
            return {"feature": unit_rows(found.float()).half()}

        return clock.timed("gradients", features)

    spec = {"projection": projector.identity}
    pool, target = (
        task.map_rows(corpus, rows, name="frontier-gradients", spec=spec, start=start)
        for corpus, rows in ((task.pool, task.rows), (task.target, task.target_rows))
    )
    return products(pool, pool), products(pool, target)


def products(left: StageReader, right: StageReader) -> Tensor:
    """Inner products of all rows of two stages, a few rows of each in memory at a time."""
    found = torch.empty(left.num_rows, right.num_rows)
    for j, others in right.blocks("feature", rows=512):
        columns = torch.from_numpy(others).float()
        for i, rows in left.blocks("feature", rows=512):
            found[i : i + len(rows), j : j + len(columns)] = torch.from_numpy(rows).float() @ columns.T
    return found


def embedded(task: Task, clock: Clock, embedding: AnyEmbedding) -> tuple[Tensor, Tensor]:
    """Embeddings of pool and target rows."""
    label = label_of(embedding)
    if isinstance(embedding, Given):
        raise TypeError("embeddings from elsewhere have no cost to measure")
    if isinstance(embedding, TfIdf):
        started = time.process_time()
        texts = RowEmbeddings(task, dtype="float16")
        pool = texts.of(embedding, task.pool, task.rows)(0, len(task.rows))
        clock.add(label, len(task.rows), time.process_time() - started)
        return pool, texts.of(embedding, task.target, task.target_rows)(0, len(task.target_rows))

    def start() -> Any:
        embed = embedding.start(task.loaded.model)
        return clock.timed(label, lambda batch: {"embedding": embed(batch)["embedding"].half()})

    spec = {**embedding.identity, "label": label}
    pool, target = (
        read(
            task.map_rows(corpus, rows, name="frontier-embedding", spec=spec, start=start, work="forward"), "embedding"
        )
        for corpus, rows in ((task.pool, task.rows), (task.target, task.target_rows))
    )
    return pool, target


def forward_cost(task: Task, clock: Clock) -> None:
    """One plain pass for the losses, the unit that every other cost may be read in."""

    def start() -> Any:
        def losses(batch: Batch) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"loss": per_sample_losses(task.loaded.model, batch)}

        return clock.timed("forward", losses)

    task.map_rows(task.pool, task.rows, name="frontier-forward", spec={}, start=start, work="forward")


def landmarks_of(gram: Tensor, exact: Tensor, chosen: IntArray, task: Task, draw: int) -> LandmarkGradients:
    known = torch.from_numpy(chosen)
    return LandmarkGradients(
        rows=task.rows[chosen],
        without_gradient=task.rows[:0],
        columns=np.arange(exact.shape[1], dtype=np.int64),
        scores=exact[known],
        gram_of=lambda places: gram[known[places]][:, known[places]],
        identity={"draw": draw, "count": len(chosen), "sample": len(gram)},
    )


def agreement(
    choice: Choice, embeddings: Known, gram: Tensor, exact: Tensor, chosen: IntArray, task: Task
) -> dict[str, float]:
    """Recovery of gradients and agreement of scores on the rows that are no landmarks, means over targets."""
    group = torch.from_numpy(task.target_group)
    rows = embeddings.of(choice.embedding, task.pool, task.rows)(0, len(task.rows))
    target = embeddings.of(choice.embedding, task.target, task.target_rows)(0, exact.shape[1])
    known, unseen = torch.from_numpy(chosen), torch.from_numpy(np.setdiff1d(np.arange(len(gram)), chosen))
    basis = candidate_basis(choice.candidate, rows[known])
    directions = basis.transform.apply(target) if choice.residual else None
    predicted = fit_kernel_ridge(basis, exact[known], directions=directions).predict(rows[unseen])
    mapped = basis.transform.apply(rows[unseen]).double()
    kernel = kernel_matrix(mapped, basis.landmarks.double(), basis.kernel, basis.median)
    recovery = recovery_cosines(
        torch.cholesky_solve(kernel.T, basis.factor).T,
        gram[known][:, known].double(),
        gram[unseen][:, known].double(),
        gram.diagonal()[unseen].double().sqrt(),
    )
    ranks = torch.tensor(spearman(predicted, exact[unseen]))
    targets = range(len(task.target_names))
    mean = [torch.stack([x[:, group == g].mean(1) for g in targets], 1) for x in (predicted, exact[unseen])]
    count = max(1, len(unseen) // 20)
    top = [[set(m[:, g].topk(count).indices.tolist()) for m in mean] for g in targets]
    return {
        "recovery": float(recovery.mean()),
        "spearman": float(np.mean(spearman(*mean))),
        "spearman_rows": float(np.mean([float(ranks[group == g].mean()) for g in targets])),
        "top5": float(np.mean([len(a & b) / count for a, b in top])),
    }


def settings_of(embedding: AnyEmbedding) -> EmbeddingSettings:
    """What names exactly this embedding, out of the candidates."""
    extra = {k: getattr(embedding, k) for k in ("depth", "directions", "positions", "combine") if hasattr(embedding, k)}
    return dataclasses.replace(ANY, name=embedding.name, **extra)


def done(path: Path) -> set[tuple[str, ...]]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(line["embedding"], line["landmarks"], line["draw"]) for line in csv.DictReader(file)}


def cases(embeddings: Iterable[AnyEmbedding], budgets: Iterable[float]) -> dict[str, tuple[Any, KernelSettings]]:
    found: dict[str, tuple[Any, KernelSettings]] = {}
    for embedding in embeddings:
        found[label_of(embedding)] = (settings_of(embedding), OWN_KERNELS)
    paper = dataclasses.replace(ANY, name="jvp", depth=4, directions=2, positions="last")
    found["jvp as published"] = (paper, PAPER_KERNELS)
    for budget in budgets:
        found[f"auto {budget:g}"] = (dataclasses.replace(ANY, budget=budget), OWN_KERNELS)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--target", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=3072, help="random rows of the pool")
    parser.add_argument("--target-rows", type=int, default=32, help="the first so many of each target")
    parser.add_argument("--pool-rows", type=int, help="rows that the cost is reckoned for; default: those of the pool")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--landmarks", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0])
    parser.add_argument("--projection", default="factorized", help="of the exact gradients")
    parser.add_argument("--projection-dim", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--out", type=Path, default=Path("tamis-out/frontier"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/frontier.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    task, clock = question(options), Clock(options.out / "clock.jsonl")
    print(
        f"{len(task.rows)} rows, {int(task.pool.lengths[task.rows].sum())} tokens, {len(task.target_rows)} target rows"
    )
    gram, exact = gradients_of(task, clock, options.projection, options.projection_dim)
    forward_cost(task, clock)
    seed = child_seed(task.seed, "embedding") % 2**31
    paper = Jvp(depth=4, directions=2, positions="last", seed=seed)
    vectors: dict[str, tuple[Tensor, Tensor]] = {}
    wanted = [dataclasses.replace(ANY, budget=budget) for budget in sorted(options.budgets, reverse=True)]
    every = {label_of(e): e for settings in wanted for e in candidate_embeddings(settings, task)}
    named: list[AnyEmbedding] = [*every.values(), HiddenMean(), Rds()]
    for embedding in named:
        vectors[label_of(embedding)] = embedded(task, clock, embedding)
        passes = clock.per_row(label_of(embedding)) / clock.per_row("forward")
        print(f"{label_of(embedding):<28} {passes:.2f} forward passes")
    of_paper = Clock(options.out / "clock-paper.jsonl")  # another table: the label is that of our own setting
    published = embedded(task, of_paper, paper)
    known = Known(task, {k: v[0] for k, v in vectors.items()}, {k: v[1] for k, v in vectors.items()})
    with_paper = Known(task, {label_of(paper): published[0]}, {label_of(paper): published[1]})

    pool_rows, of_gradient = options.pool_rows or len(task.pool), clock.per_row("gradients")
    config: Any = task.loaded.model.config
    blocks = int(config.num_hidden_layers)
    finished = done(options.csv)
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not finished:
            writer.writeheader()
        for draw in range(options.draws):
            for count in (n for n in options.landmarks if n < len(task.rows)):
                chosen = np.sort(random_subset(child_seed(draw, "frontier landmarks", count), len(task.rows), count))
                landmarks = landmarks_of(gram, exact, chosen, task, draw)
                for name, (settings, kernels) in cases(named, options.budgets).items():
                    if (name, str(count), str(draw)) in finished:
                        continue
                    tables = with_paper if name == "jvp as published" else known
                    columns = [torch.tensor([j]) for j in range(exact.shape[1])]
                    choice = choose_embedding(
                        task, tables, landmarks, columns, task.target_group, settings=settings, kernels=kernels
                    )
                    tried = embeddings_within(settings, blocks, seed) if settings.name == "auto" else ()
                    timer = of_paper if tables is with_paper else clock
                    own = timer.per_row(label_of(choice.embedding))
                    trying = min(count, COMPARED) * sum(clock.per_row(label_of(e)) for e in tried)
                    if tried and count <= COMPARED:  # the winner's are those of the landmarks
                        trying -= count * own
                    cost = count * of_gradient + pool_rows * own + trying
                    writer.writerow(
                        {
                            "embedding": name,
                            "chosen": label_of(choice.embedding),
                            "landmarks": count,
                            "draw": draw,
                            **{k: round(v, 4) for k, v in agreement(choice, tables, gram, exact, chosen, task).items()},
                            "expected_recovery": round(choice.recovery, 4),
                            "expected_spearman": round(choice.mean_spearman, 4),
                            "kernel": f"{choice.candidate.kernel.name} {choice.candidate.kernel.scale:g}",
                            "damping": choice.candidate.damping,
                            "residual": choice.residual,
                            "seconds_per_row": round(own, 4),
                            "cost": round(cost / (pool_rows * of_gradient), 4),
                            "rows": len(task.rows),
                            "target_rows": exact.shape[1],
                        }
                    )
                    file.flush()


if __name__ == "__main__":
    main()
