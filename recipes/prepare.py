"""Fetch the tasks of the recipes and write them as chats: ``python recipes/prepare.py`` (needs access to the hub).

For each task ``data/<task>.jsonl`` (the target, from rows that may be learned from) and ``data/<task>-held-out.jsonl``
(rows that only measure). Which rows is fixed by a seed. Benchmark rows must not go into a model meant for release.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TASKS = ("gsm8k", "mmlu", "bbh", "tydiqa")
HELD_OUT = 400
LETTERS = "ABCD"

Row = Mapping[str, Any]


def gsm8k_chat(row: Row, number: int) -> dict[str, Any]:
    """Question and worked answer; the marks of the calculator are taken out."""
    answer = row["answer"]
    while "<<" in answer:
        before, _, rest = answer.partition("<<")
        answer = before + rest.partition(">>")[2]
    return chat(f"gsm8k-{number}", row["question"], answer)


def mmlu_chat(row: Row, number: int) -> dict[str, Any]:
    """Question, four choices, and the letter of the right one."""
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return chat(f"mmlu-{row['subject']}-{number}", f"{row['question']}\n{choices}\nAnswer:", LETTERS[row["answer"]])


def bbh_chat(row: Row, number: int) -> dict[str, Any]:
    """Question and bare answer; the exemplars with reasoning of the papers are not in this data set."""
    return chat(f"bbh-{row['subtask']}-{number}", row["input"], row["target"])


def tydiqa_chat(row: Row, number: int) -> dict[str, Any]:
    """The passage that holds the answer, the question, and the first answer given."""
    prompt = f"{row['context']}\n\nQuestion: {row['question']}\nAnswer:"
    return chat(f"tydiqa-{row['id']}", prompt, row["answers"]["text"][0])


def chat(name: str, user: str, assistant: str) -> dict[str, Any]:
    """One turn of each."""
    messages = [{"role": "user", "content": user.strip()}, {"role": "assistant", "content": assistant.strip()}]
    return {"id": name, "source": name.partition("-")[0], "messages": messages}


CHATS = {"gsm8k": gsm8k_chat, "mmlu": mmlu_chat, "bbh": bbh_chat, "tydiqa": tydiqa_chat}


def some_of_each(rows: list[Row], key: str, count: int, *, seed: int) -> list[int]:
    """Positions of ``count`` random rows of every value of ``key``, ascending."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(str(row[key]), []).append(place)
    draw = random.Random(seed)
    return sorted(place for own in places.values() for place in draw.sample(own, min(count, len(own))))


def rows_of(task: str, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Target rows and held-out rows of a task, as the hub has them."""
    from datasets import get_dataset_config_names, load_dataset

    draw = random.Random(seed)
    if task == "gsm8k":
        data = load_dataset("openai/gsm8k", "main")
        learn, measure = list(data["train"]), list(data["test"])
        return draw.sample(learn, 64), draw.sample(measure, HELD_OUT)
    if task == "mmlu":
        data = load_dataset("cais/mmlu", "all")
        return list(data["dev"]), draw.sample(list(data["test"]), HELD_OUT)
    if task == "tydiqa":
        data = load_dataset("google-research-datasets/tydiqa", "secondary_task")
        learn = [{**row, "language": row["id"].partition("-")[0]} for row in data["train"]]
        chosen = some_of_each(learn, "language", 1, seed=seed)
        return [learn[place] for place in chosen], draw.sample(list(data["validation"]), HELD_OUT)
    found: list[Row] = []
    for subtask in get_dataset_config_names("SaylorTwift/bbh"):
        found += [{**row, "subtask": subtask} for row in load_dataset("SaylorTwift/bbh", subtask, split="test")]
    chosen = some_of_each(found, "subtask", 15, seed=seed)  # three to select with, twelve to measure, of each subtask
    by_subtask: dict[str, int] = {}
    target, held_out = list[Row](), list[Row]()
    for place in chosen:
        subtask = found[place]["subtask"]
        by_subtask[subtask] = by_subtask.get(subtask, 0) + 1
        (target if by_subtask[subtask] <= 3 else held_out).append(found[place])
    return target, held_out


def main() -> None:
    """Write the files of the tasks named, all of them unless some are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    unknown = sorted(set(settings.tasks) - set(TASKS))
    if unknown:
        parser.error(f"{unknown[0]!r} is no task; expected some of {', '.join(TASKS)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    for task in settings.tasks:
        for kind, rows in zip(("", "-held-out"), rows_of(task, seed=settings.seed), strict=True):
            file = settings.out / f"{task}{kind}.jsonl"
            lines = (json.dumps(CHATS[task](row, number), ensure_ascii=False) for number, row in enumerate(rows))
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            print(f"{file}: {len(rows)} rows")


if __name__ == "__main__":
    main()
