"""Recipes: every file is read as the command line reads it, and rows of the tasks become chats."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tamis.cli.config import merge_settings
from tamis.notation import METHOD_SUMMARIES, ONLINE_SUMMARIES, target_parts
from tamis.online.methods.by_name import make_online_method
from tamis.online.settings import StepSettings, check_combination
from tamis.runs.select import make_method
from tamis.settings import CompareSettings, SelectSettings, TrainRunSettings
from tamis.settings.proxy import ProxySettings, recipe_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
VERBS: Mapping[str, Any] = {
    "select": SelectSettings,
    "train": TrainRunSettings,
    "proxy": ProxySettings,
    "compare": CompareSettings,
}


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PREPARE = load("prepare", ROOT / "recipes" / "prepare.py")


def verb_of(recipe: Path) -> str:
    return recipe.stem.removeprefix("small-").partition("-")[0]


def settings_of(recipe: Path) -> Any:
    return merge_settings(VERBS[verb_of(recipe)], {}, str(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_settings_and_methods_of_a_recipe_are_accepted(recipe: Path) -> None:
    settings = settings_of(recipe)
    if isinstance(settings, SelectSettings):
        make_method(settings)
    elif isinstance(settings, TrainRunSettings):
        method = make_online_method(settings.method, settings.set, keep=settings.keep, oversample=settings.oversample)
        check_combination(method, StepSettings(candidates=settings.candidates))
    elif isinstance(settings, ProxySettings):
        assert recipe_of(settings)
    else:
        for text in settings.contenders:
            assert text.method in (ONLINE_SUMMARIES if text.is_online else METHOD_SUMMARIES)
            if not text.is_online:
                make_method(settings.select_settings(text, budget=settings.budget, out=settings.out))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_files_that_a_recipe_names_are_those_that_its_first_command_writes(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    settings = settings_of(recipe)
    said = re.search(r"python recipes/prepare\.py((?: \w+)*)", text)
    assert said, "no command prepares the tasks"
    written = set(said[1].split()) or set(PREPARE.TASKS)
    for given in (*settings.target, *getattr(settings, "eval", ())):
        name, path = target_parts(given)
        assert path in (f"recipes/data/{name}.jsonl", f"recipes/data/{name}-held-out.jsonl")
        assert name in written
    assert f"--config recipes/{recipe.name}" in text and f"tamis {verb_of(recipe)} " in text
    assert settings.out == f"out/{recipe.stem}"


def test_every_recipe_has_its_twin_for_a_small_model() -> None:
    small = {recipe.stem.removeprefix("small-") for recipe in RECIPES if recipe.stem.startswith("small-")}
    large = {recipe.stem for recipe in RECIPES if not recipe.stem.startswith("small-")}
    assert small and all(any(stem.startswith(twin) for twin in small) for stem in large)
    for recipe in RECIPES:
        is_small = settings_of(recipe).model == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert is_small == recipe.stem.startswith("small-")


def test_the_page_of_recipes_lists_every_file() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert {path.name for path in RECIPES} == set(re.findall(r"`([\w.-]+\.yaml)`", page))


@pytest.mark.parametrize(
    ("task", "row", "user", "assistant"),
    [
        (
            "gsm8k",
            {"question": "How many? ", "answer": "2 + 3 = <<2+3=5>>5, twice <<5*2=10>>10.\n#### 10"},
            "How many?",
            "2 + 3 = 5, twice 10.\n#### 10",
        ),
        (
            "mmlu",
            {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 2, "subject": "law"},
            "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
            "C",
        ),
        ("bbh", {"input": "not True is", "target": "False", "subtask": "boolean"}, "not True is", "False"),
        (
            "tydiqa",
            {"id": "finnish-1", "context": "Kissa on.", "question": "Mikä?", "answers": {"text": ["Kissa", "kissa"]}},
            "Kissa on.\n\nQuestion: Mikä?\nAnswer:",
            "Kissa",
        ),
    ],
)
def test_rows_of_the_tasks_become_chats(task: str, row: dict[str, Any], user: str, assistant: str) -> None:
    made = PREPARE.CHATS[task](row, 7)
    assert [turn["content"] for turn in made["messages"]] == [user, assistant]
    assert made["source"] == task


def test_some_rows_of_each_kind_are_drawn_by_seed() -> None:
    rows = [{"kind": "ab"[i % 2]} for i in range(9)]
    drawn = PREPARE.some_of_each(rows, "kind", 2, seed=1)
    assert drawn == sorted(set(drawn)) and [rows[i]["kind"] for i in drawn].count("a") == 2 == len(drawn) / 2
    assert drawn == PREPARE.some_of_each(rows, "kind", 2, seed=1)
    assert PREPARE.some_of_each(rows, "kind", 99, seed=0) == list(range(9))
