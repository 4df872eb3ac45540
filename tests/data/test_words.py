"""Words of any script."""

import pytest

from tamis.data.words import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP, x_1 = 3.5!", ["don", "t", "stop", "x_1", "3", "5"]),
        ("naïve NAI\u0308VE Straße", ["naïve", "naïve", "strasse"]),
        ("ﬁt ２", ["fit", "2"]),  # a ligature and a full-width digit
        ("東京へ行く ok", ["東", "京", "へ", "行", "く", "ok"]),
        ("Привет, мир", ["привет", "мир"]),
        ("", []),
        (" \n\t…", []),
    ],
)
def test_words_are_found_in_any_script(text, expected):
    assert words(text) == expected
