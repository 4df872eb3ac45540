"""Whether `influence-function` and kronfluence say the same: the same rows, losses and damping, score for score.

    python benchmarks/kfac_agreement.py --model MODEL --pool POOL --target TARGET --csv results.csv

kronfluence (see benchmarks/peers-requirements.txt) must be importable beside tamis. With the rows' own labels both are
given the same numbers, so scores may differ by rounding and by one constant factor, since the two divide their factors
by different counts. With sampled labels each draws its own, so that two draws of ours show how much a draw changes.
The lines that compare two draws are named "tamis, another seed".
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tamis.collect import Collecting
from tamis.collect import Task as Selection
from tamis.corpus import Corpus, tokenize
from tamis.data.examples import read_examples
from tamis.data.render import Renderer
from tamis.model.load import ModelSettings
from tamis.model.targets import gradient_layers
from tamis.progress import NoProgress
from tamis.score.influence_function import InfluenceFunction
from tamis.solve.leave_one_out import spearman

IGNORED = -100
DAMPING = 0.1  # of the mean eigenvalue: kronfluence's own rule when no damping is given


@dataclass(frozen=True)
class Agreement:
    """Two matrices of scores, pool rows by target rows."""

    correlation: float  # mean over target rows
    rank_correlation: float
    difference: float  # largest, over the largest score, after the best common factor


def compare(ours: np.ndarray, theirs: np.ndarray) -> Agreement:
    factor = (ours * theirs).sum() / (theirs * theirs).sum()
    pairs = list(zip(ours.T, theirs.T, strict=True))
    return Agreement(
        correlation=float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])),
        rank_correlation=float(np.mean(spearman(torch.from_numpy(ours), torch.from_numpy(theirs)))),
        difference=float(np.abs(ours - factor * theirs).max() / np.abs(ours).max()),
    )


class Losses(Task):  # type: ignore[misc]  # kronfluence has no types
    """While factors are fitted a row's loss is a sum over the root of its tokens, afterwards a mean: as in tamis."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.is_fitting = names, True

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        if sample:
            with torch.no_grad():
                probabilities = torch.softmax(logits.flatten(0, 1), dim=1)
                drawn = torch.multinomial(probabilities, num_samples=1).view(labels.shape)
            labels = torch.where(labels == IGNORED, labels, drawn)
        tokens = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        counts = (labels != IGNORED).sum(1)
        return (tokens.sum(1) / (counts.sqrt() if self.is_fitting else counts)).sum()

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"]


def examples(corpus: Corpus) -> list[dict[str, list[int]]]:
    rows = corpus.take(np.arange(len(corpus)))
    return [
        {
            "input_ids": row.input_ids.tolist(),
            "labels": np.where(row.supervised, row.input_ids, IGNORED).tolist(),
        }
        for row in rows
    ]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": mask}


def read_corpus(name: str, path: Path, count: int, model: str, folder: Path, max_length: int) -> Corpus:
    """The first rows of a file of chats as prompt and answer, which need no chat template."""
    kept = folder / f"{name}.jsonl"
    with path.open(encoding="utf-8") as lines, kept.open("w", encoding="utf-8") as out:
        written = 0
        for line in lines:
            messages = json.loads(line)["messages"]
            prompt, answer = messages[0]["content"] + " ", messages[1]["content"]
            if written < count and len(prompt.encode()) < max_length - 8:  # else no token of the answer is left
                out.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
                written += 1
    renderer = Renderer(AutoTokenizer.from_pretrained(model), max_length=max_length)
    found = read_examples([str(kept)])
    return tokenize(name, found, renderer, root=folder / "store", on_bad_row="fail", progress=NoProgress())


def of_tamis(pool: Corpus, target: Corpus, model: str, folder: Path, *, seed: int, **settings: Any) -> np.ndarray:
    task = Selection(
        pool=pool,
        target=target,
        target_names=("target",),
        target_rows=np.arange(len(target)),
        target_group=np.zeros(len(target), np.int64),
        rows=np.arange(len(pool)),
        model_settings=ModelSettings(name=model, dtype="float32", device="cpu"),
        collecting=Collecting(batch_tokens=1024),
        store=folder / "store",
        seed=seed,
    )
    method = InfluenceFunction(normalize="dot", damping=DAMPING, factor_rows=None, **settings)
    return method.score(task).values.astype(np.float64)


def of_kronfluence(
    pool: Corpus, target: Corpus, model_name: str, folder: Path, *, strategy: str, labels: str
) -> np.ndarray:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    losses = Losses([layer.name for layer in gradient_layers(model)])
    model = prepare_model(model, losses)
    analyzer = Analyzer(
        analysis_name="pool", model=model, task=losses, cpu=True, disable_tqdm=True, output_dir=str(folder)
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
    name = f"{strategy}-{labels}"
    factors = FactorArguments(strategy=strategy, use_empirical_fisher=labels == "empirical")
    rows = examples(pool)
    analyzer.fit_all_factors(name, rows, factor_args=factors, per_device_batch_size=8)
    losses.is_fitting = False
    analyzer.compute_pairwise_scores(
        scores_name=name,
        factors_name=name,
        query_dataset=examples(target),
        train_dataset=rows,
        per_device_query_batch_size=8,
        per_device_train_batch_size=8,
        score_args=ScoreArguments(damping_factor=None),
    )
    found: npt.NDArray[np.float64] = analyzer.load_pairwise_scores(name)["all_modules"].T.double().numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True, help="JSONL of chats")
    parser.add_argument("--target", type=Path, required=True, help="JSONL of chats")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--target-rows", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = read_corpus("pool", given.pool, given.rows, given.model, folder, given.max_length)
        target = read_corpus("target", given.target, given.target_rows, given.model, folder, given.max_length)
        for labels in ("empirical", "sampled"):
            for strategy in ("kfac", "ekfac"):
                started = time.perf_counter()
                ours = of_tamis(pool, target, given.model, folder, seed=0, labels=labels, strategy=strategy)
                middle = time.perf_counter()
                theirs = of_kronfluence(pool, target, given.model, folder, strategy=strategy, labels=labels)
                ended = time.perf_counter()
                others = {"kronfluence": (theirs, ended - middle)}
                if labels == "sampled":
                    again = of_tamis(pool, target, given.model, folder, seed=1, labels=labels, strategy=strategy)
                    others["tamis, another seed"] = (again, time.perf_counter() - ended)
                for other, (scores, seconds) in others.items():
                    found = compare(ours, scores)
                    line = {
                        "labels": labels,
                        "strategy": strategy,
                        "beside": other,
                        "pool_rows": len(pool),
                        "target_rows": len(target),
                        "correlation": f"{found.correlation:.6f}",
                        "rank_correlation": f"{found.rank_correlation:.6f}",
                        "largest_difference": f"{found.difference:.2e}",
                        "seconds": f"{middle - started:.1f}",
                        "seconds_of_the_other": f"{seconds:.1f}",
                    }
                    print(line, flush=True)
                    lines.append(line)
    if given.csv:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        with given.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
