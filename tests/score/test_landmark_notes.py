import pytest

from tamis.embeddings import Gradient, HiddenError
from tamis.score.embedding_choice import Choice, Tried
from tamis.score.landmark_notes import is_trusted, notes_of_choice, verdict
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


@pytest.mark.parametrize(
    ("choice", "trust", "advice"),
    [
        (choice_of(0.95, 0.94), "may be trusted nearly like exact ones", "spend more per row (embedding_budget)"),
        (choice_of(0.95, 0.94, sketch=True), "may be trusted", "take a larger sketch (side)"),
        (
            choice_of(0.61, 0.5),
            "by the worst target, code (0.51), these scores find most of the best rows",
            "add landmarks: with half of them the mean correlation was 0.50",
        ),
        # 0.9 on one target does not make up for 0.4 on the other.
        (choice_of(0.65, 0.64, spread=0.25), "by the worst target, code (0.40), do not trust the order", "spend more"),
        (choice_of(0.3, 0.29), "do not trust the order", "or score with tracin exactly"),
        (choice_of(0.61, None), "find most", "too few landmarks to tell"),
    ],
)
def test_verdict_says_how_far_to_trust_and_what_would_help(choice: Choice, trust: str, advice: str) -> None:
    sentence = verdict(choice, ("maths", "code"))
    assert sentence.startswith("Verdict: ") and trust in sentence and advice in sentence
    assert is_trusted(choice) == ("do not trust" not in sentence)


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
