import dataclasses

import pytest

from tamis.embeddings import Gradient, HiddenError
from tamis.score.distillation.candidates import EmbeddingSettings
from tamis.score.distillation.choice import COMPARED, KERNELS_COMPARED, Choice, Tried
from tamis.score.distillation.notes import diagnosis, is_trusted, notes_of_carried_term, notes_of_choice, verdict
from tamis.score.influence_distillation import InfluenceDistillation
from tamis.solve.landmarks import LANDMARK_RULES, LandmarkRule
from tamis.solve.leave_one_out import Candidate


def choice_of(spearman: float, half: float | None, *, sketch: bool = False, spread: float = 0.1) -> Choice:
    return Choice(
        embedding=Gradient() if sketch else HiddenError(),
        candidate=Candidate(),
        residual=True,
        recovery=0.31,
        spearman=(spearman + spread, spearman - spread),
        with_half=half,
        tried=(Tried(label="tfidf", recovery=0.2, passes=None), Tried(label="hidden-error", recovery=0.4, passes=1.25)),
    )


EXACTLY = "score with tracin exactly, which costs about as much"
AUTO = InfluenceDistillation().embedding_settings()


@pytest.mark.parametrize(
    ("choice", "trust", "advice"),
    [
        (
            choice_of(0.95, 0.94),
            "order most rows as exact ones do",
            "score with tracin exactly, which costs about as much as a dearer embedding",
        ),
        (choice_of(0.95, 0.94, sketch=True), "order most rows", "score with tracin exactly"),
        (
            choice_of(0.61, 0.5),
            "by the worst target, code (0.51), these scores are usable, but miss about half of the very best rows",
            "add landmarks: with half of them the mean correlation was 0.50",
        ),
        # 0.9 on one target does not make up for 0.4 on the other.
        (choice_of(0.65, 0.64, spread=0.25), "by the worst target, code (0.40), do not trust the order", "exactly"),
        (choice_of(0.3, 0.2), "do not trust the order", "still rising, or score with tracin exactly."),
        (choice_of(0.61, None), "are usable", "too few landmarks to tell"),
    ],
)
def test_verdict_says_how_far_to_trust_and_what_would_help(choice: Choice, trust: str, advice: str) -> None:
    sentence = verdict(choice, ("maths", "code"), AUTO)
    assert sentence.startswith("Verdict: ") and trust in sentence and advice in sentence
    assert is_trusted(choice) == ("do not trust" not in sentence)


@pytest.mark.parametrize(
    ("settings", "sketch", "advice"),
    [
        (AUTO, False, EXACTLY),  # what is left to try is a gradient of every row
        (dataclasses.replace(AUTO, budget=0.5), False, "spend more per row (embedding_budget=1)"),
        (dataclasses.replace(AUTO, budget=2.0), True, EXACTLY),
        (dataclasses.replace(AUTO, name="hidden-error"), False, "spend more per row (embedding=auto in place of "),
        (dataclasses.replace(AUTO, name="gradient"), True, EXACTLY),
    ],
)
def test_the_advice_is_something_that_can_help(settings: EmbeddingSettings, sketch: bool, advice: str) -> None:
    said = verdict(choice_of(0.3, 0.3, sketch=sketch), ("maths", "code"), settings)
    assert advice in said and said.count("score with tracin exactly") == 1
    assert ("embedding_budget" in said) == ("embedding_budget" in advice)
    # More landmarks help whatever the settings are.
    assert "add landmarks" in verdict(choice_of(0.3, 0.1, sketch=sketch), ("maths", "code"), settings)


def test_the_console_gets_the_choice_the_expectation_and_the_verdict_once() -> None:
    good, bad = (diagnosis(choice_of(value, value), ("maths", "code"), AUTO) for value in (0.9, 0.3))
    assert list(good) == ["embedding", "expected", "verdict"]
    assert good["embedding"].startswith("hidden-error (1.2 forward passes a row), kernel ")
    assert good["embedding"].endswith("best of 2 tried")
    assert "cosine of 0.31" in good["expected"] and "correlation of 0.90 (worst target code: 0.80)" in good["expected"]
    assert "Verdict: " + good["verdict"] == verdict(choice_of(0.9, 0.9), ("maths", "code"), AUTO)
    assert "see the warning" in bad["verdict"]  # which has the whole of it


def test_notes_say_on_how_many_landmarks_embeddings_and_kernels_were_compared() -> None:
    one = dataclasses.replace(choice_of(0.6, 0.5), tried=(Tried(label="rds", recovery=0.2, passes=1.0),))
    cases = (
        (choice_of(0.6, 0.5), COMPARED, "gradients of 256 of the landmarks"),
        (one, KERNELS_COMPARED, "on 1,024 of the"),
    )
    for choice, most, said in cases:
        for landmarks in (most, most + 1):
            chosen, _ = notes_of_choice(
                choice, landmarks=landmarks, rule="uniform", target_names=("a", "b"), per_row=True
            )
            assert (said in chosen) == (landmarks > most)


def test_where_scores_are_exact_only_the_term_is_said_to_be_carried() -> None:
    (note,) = notes_of_carried_term(choice_of(0.6, 0.5), landmarks=6)
    assert "carried the second-order term, not the scores, from 6 landmarks" in note
    assert "hidden-error (1.2 forward passes a row)" in note and "tfidf 0.200" in note


def notes(rule: LandmarkRule = "uniform", *, per_row: bool = True) -> tuple[str, str]:
    names = ("maths", "code")
    return notes_of_choice(choice_of(0.6, 0.5), landmarks=64, rule=rule, target_names=names, per_row=per_row)


def test_notes_name_what_was_tried_what_it_cost_and_each_target() -> None:
    chosen, expected = notes()
    assert "64 landmarks" in chosen and "hidden-error (1.2 forward passes a row)" in chosen
    assert "tfidf 0.200, hidden-error 0.400" in chosen
    assert "cosine of 0.31" in expected and "0.60 (maths 0.70, code 0.50)" in expected
    assert "single target rows" in expected and "mean targets" in notes(per_row=False)[1]


@pytest.mark.parametrize("rule", LANDMARK_RULES)
def test_only_landmarks_drawn_at_random_speak_for_the_other_rows(rule: LandmarkRule) -> None:
    _, expected = notes(rule)
    assert expected.startswith("Expected on rows that are no landmarks, ") == (rule == "uniform")
    assert expected.startswith(f"Of the landmarks, which {rule} made unlike the other rows") == (rule != "uniform")


def test_a_choice_survives_json() -> None:
    choice = choice_of(0.6, None, sketch=True)
    assert Choice.from_plain(choice.to_plain()) == choice
