import pytest

from tamis.embeddings import Gradient, HiddenError
from tamis.score.embedding_choice import Choice, Tried
from tamis.score.landmark_notes import is_trusted, notes_of_choice, verdict
from tamis.solve.leave_one_out import Candidate


def choice_of(spearman: float, half: float | None, *, sketch: bool = False) -> Choice:
    return Choice(
        embedding=Gradient() if sketch else HiddenError(),
        candidate=Candidate(),
        residual=True,
        recovery=0.31,
        spearman=(spearman - 0.1, spearman + 0.1),
        with_half=half,
        tried=(Tried(label="tfidf", recovery=0.2, passes=None), Tried(label="hidden-error", recovery=0.4, passes=1.25)),
    )


@pytest.mark.parametrize(
    ("choice", "trust", "advice"),
    [
        (choice_of(0.85, 0.84), "may be trusted nearly like exact ones", "spend more per row (embedding_budget)"),
        (choice_of(0.85, 0.84, sketch=True), "may be trusted", "take a larger sketch (side)"),
        (
            choice_of(0.6, 0.5),
            "find most of the best rows",
            "add landmarks: with half of them the correlation was 0.50",
        ),
        (choice_of(0.3, 0.29), "do not trust the order", "or score with tracin exactly"),
        (choice_of(0.6, None), "find most", "too few landmarks to tell"),
    ],
)
def test_verdict_says_how_far_to_trust_and_what_would_help(choice: Choice, trust: str, advice: str) -> None:
    sentence = verdict(choice)
    assert sentence.startswith("Verdict: ") and trust in sentence and advice in sentence
    assert is_trusted(choice) == ("do not trust" not in sentence)


def test_notes_name_what_was_tried_what_it_cost_and_each_target() -> None:
    chosen, expected = notes_of_choice(choice_of(0.6, 0.5), landmarks=64, target_names=("maths", "code"))
    assert "64 landmarks" in chosen and "hidden-error (1.2 forward passes a row)" in chosen
    assert "tfidf 0.200, hidden-error 0.400" in chosen
    assert "cosine of 0.31" in expected and "0.60 (maths 0.50, code 0.70)" in expected


def test_a_choice_survives_json() -> None:
    choice = choice_of(0.6, None, sketch=True)
    assert Choice.from_plain(choice.to_plain()) == choice
