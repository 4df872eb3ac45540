from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamis.data.duplicates import bands, exact_duplicates, find_leaks, first_copies, jaccard, near_duplicates, shingles
from tamis.data.examples import read_examples
from tamis.errors import InvalidSettings
from tamis.seeds import raw_words

WORDS = [f"word{n}" for n in range(400)]


def chat(question: str, answer: str, **extra) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


@pytest.fixture
def read(tmp_path):
    def write_and_read(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_examples([str(path)])

    return write_and_read


def random_words(seed: int, count: int) -> list[str]:
    return [WORDS[int(n) % len(WORDS)] for n in raw_words(seed, count)]


def test_copies_point_to_the_first_whatever_their_ids_and_sources(read):
    rows = [chat("a", "b", id=1), chat("c", "d"), chat("a", "b", id=2, source="else"), chat("a", "b", note="x")]
    assert exact_duplicates(read(rows)).tolist() == [0, 1, 0, 0]


@given(st.lists(st.sampled_from("abcd")))
def test_first_copies_agree_with_a_search_from_the_start(keys):
    assert first_copies(keys).tolist() == [keys.index(key) for key in keys]


def test_an_instruction_row_copies_the_chat_that_it_becomes(read, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps(chat("Add.\n\n1 1", "2")), encoding="utf-8")
    alpaca = tmp_path / "alpaca.jsonl"
    alpaca.write_text(json.dumps({"instruction": "Add.", "input": "1 1", "output": "2"}), encoding="utf-8")
    assert exact_duplicates(read_examples([str(chats), str(alpaca)])).tolist() == [0, 0]


def test_near_copies_are_found_and_agree_with_all_pairs(read):
    base = [random_words(seed, 60) for seed in range(12)]
    rows = []
    for words in base:
        rows.append(chat(" ".join(words[:30]), " ".join(words[30:])))
        changed = [*words]
        changed[-1] = "changed"  # 58 shingles each, 57 shared: 57/59
        rows.append(chat(" ".join(changed[:30]).upper(), " ".join(changed[30:]) + "!"))
        rows.append(chat(" ".join(words[:30]), "another answer altogether"))
    examples = read(rows)
    sets = [shingles(examples.text(row)) for row in range(len(rows))]
    expected = []
    for row in range(len(rows)):
        kept = [c for c in range(row) if expected[c] == c and jaccard(sets[row], sets[c]) >= 0.8]
        expected.append(kept[0] if kept else row)
    assert near_duplicates(examples, threshold=0.8).tolist() == expected
    assert sum(first != row for row, first in enumerate(expected)) == 12


def test_bands_miss_at_most_one_pair_in_a_hundred_at_the_threshold():
    assert bands(0.8) == (21, 6)  # 1 - 0.8^6 = 0.738, to the 21st 0.0017; 7 rows would give 0.79^18 = 0.014
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0):
        count, rows = bands(threshold)
        assert count * rows <= 128
        assert (1 - threshold**rows) ** count <= 0.01


def test_pairs_just_above_the_threshold_are_found(read):
    rows = []
    for seed in range(40):
        words = [f"s{seed}w{n}" for n in range(52)]  # 50 shingles
        rows.append({"text": " ".join(words)})
        rows.append({"text": " ".join([*words[:-5], *(f"s{seed}x{n}" for n in range(5))])})  # 45 shared of 55
    found = near_duplicates(read(rows), threshold=0.8)
    # Each pair (similarity 0.818) is missed with probability 0.0007, so 40 pairs hold one miss in 36 seeds at most.
    assert (found[1::2] == found[::2]).sum() >= 39


def test_exact_copies_of_a_near_copy_follow_it_to_the_kept_row(read):
    words = random_words(1, 60)
    near = [*words[:-1], "changed"]
    rows = [chat("q", " ".join(words)), chat("q", " ".join(near)), chat("q", " ".join(near), id="again")]
    assert near_duplicates(read(rows)).tolist() == [0, 0, 0]


def test_rows_below_the_threshold_stay_apart_and_the_result_repeats(read):
    rows = [chat(" ".join(random_words(seed, 30)), "ok") for seed in range(20)]
    examples = read(rows)
    assert near_duplicates(examples).tolist() == list(range(20))
    assert near_duplicates(examples).tolist() == near_duplicates(examples).tolist()


def test_threshold_outside_zero_and_one_is_refused(read):
    with pytest.raises(InvalidSettings, match=r"near_threshold=0: expected a number above 0 and at most 1"):
        near_duplicates(read([chat("a", "b")]), threshold=0)


def test_shingles_ignore_case_and_punctuation_and_short_texts_are_one():
    assert shingles("One, two three four!") == {"one two three", "two three four"}
    assert shingles("Yes.") == {"yes"}
    assert shingles("?!") == {"?!"}


def test_leaks_are_told_apart_by_answer(read):
    target = read([chat("What is 2 + 2?", "4"), chat("Where?", "Here")], "target.jsonl")
    pool = read(
        [
            chat("what  is 2 + 2?\n", "Four."),
            chat("Why?", "So"),
            chat("Where?", "Here", id="other"),
            chat("What is 2?", "4"),
        ]
    )
    leaks = find_leaks(pool, target)
    assert leaks.exact.tolist() == [2]
    assert leaks.same_prompt.tolist() == [0]
    assert leaks.exact.dtype == leaks.same_prompt.dtype == np.int64


def test_system_messages_do_not_hide_a_leak_and_text_rows_have_no_prompt(read):
    target = read([chat("Where?", "Here")], "target.jsonl")
    hidden = chat("Where?", "There")
    hidden["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert find_leaks(read([hidden]), target).same_prompt.tolist() == [0]
    texts = read([{"text": "Where?"}], "texts.jsonl")
    assert find_leaks(texts, texts).exact.tolist() == [0]
    assert find_leaks(texts, target).same_prompt.tolist() == []


def test_equal_hashes_of_different_prompts_are_no_leak(read):
    target, pool = read([chat("one", "1")], "target.jsonl"), read([chat("two", "2")])
    pool.prompt_hashes[:] = target.prompt_hashes
    assert find_leaks(pool, target).same_prompt.tolist() == []
