from __future__ import annotations

import pytest

from tamis.data.formats import RowError, digest, parse_row, prompt_text, row_format_of, trained_text

U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [U, A]}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "messages"),
        ({"prompt": "p", "prompt_id": "x", "messages": [U, A]}, "messages"),
        ({"prompt": "p", "completion": "c"}, "prompt-completion"),
        ({"instruction": "i", "input": "", "output": "o", "text": "all of it"}, "instruction"),
        ({"text": "t", "messages": None}, "text"),
    ],
)
def test_format_is_told_from_the_filled_fields(row, expected):
    assert row_format_of(row) == expected


def test_unknown_format_names_the_fields_that_arrived():
    with pytest.raises(RowError, match="unknown row format with 'question', 'answer'; expected 'messages'"):
        row_format_of({"question": "q", "answer": "a"})
    for row, field in [
        ({"messages": None}, "messages"),
        ({"instruction": "i", "output": None}, "output"),
        ({"prompt": None, "completion": None, "id": 1}, "prompt"),
        ({"text": None}, "text"),
    ]:
        with pytest.raises(RowError, match=r"^the field is null; fill it or remove the row$") as caught:
            row_format_of(row)
        assert caught.value.field == field
    assert row_format_of({"messages": None, "text": "t"}) == "text"  # Parquet fills columns of other rows with nulls
    with pytest.raises(RowError, match="unknown row format with no field at all"):
        row_format_of({})


def test_chats_keep_system_tool_and_null_content():
    messages = [{"role": "system", "content": ""}, U, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    messages += [{"role": "tool", "content": "2"}, A]
    content = parse_row({"messages": messages, "tools": '[{"name": "add"}]'}, "messages")
    assert content.messages == tuple(messages)
    assert content.tools == ({"name": "add"},)


def test_sharegpt_turns_become_messages():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    content = parse_row({"conversations": turns}, "messages")
    assert [(m["role"], m["content"]) for m in content.messages] == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_instruction_rows_become_one_turn():
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be brief."}
    content = parse_row(row, "instruction")
    assert [m["content"] for m in content.messages] == ["Be brief.", "Add.\n\n1 1", "2"]
    assert content.prompt_messages == 0
    for nothing in ({"input": ""}, {"input": None}, {"input": " "}, {}):
        plain = parse_row({"instruction": "Add.", "output": "2", **nothing}, "instruction")
        assert [m["content"] for m in plain.messages] == ["Add.", "2"]


def test_conversational_prompt_counts_its_messages():
    content = parse_row({"prompt": [U, A, U], "completion": [A]}, "prompt-completion")
    assert content.messages == (U, A, U, A)
    assert content.prompt_messages == 3


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"messages": "[]"}, "messages", "expected a list of messages, got a string"),
        ({"messages": {"role": "user"}}, "messages", "expected a list of messages, got an object"),
        ({"messages": []}, "messages", "the list of messages is empty"),
        ({"messages": [U]}, "messages", "no assistant turn, so there is nothing to train on"),
        ({"messages": ["hi", A]}, r"messages\[0\]", "expected an object with 'role' and 'content', got a string"),
        ({"messages": [{"content": "x"}, A]}, r"messages\[0\].role", "unknown role null; expected one of system"),
        ({"messages": [{"role": "human", "content": "x"}]}, r"messages\[0\].role", "unknown role 'human'"),
        (
            {"messages": [{"role": "r" * 500, "content": "x"}]},
            r"messages\[0\].role",
            r"unknown role 'r{56}\.\.\.; expected",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": None}]},
            r"messages\[1\].content",
            "null and has no tool_calls",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": " \n"}]},
            r"messages\[1\].content",
            "empty and has no tool_calls",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": []}]},
            r"messages\[1\].content",
            "empty and has no tool_calls",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": 3}]},
            r"messages\[1\].content",
            "a list of text parts, got a number",
        ),
        ({"messages": [{"role": "user", "content": None}, A]}, r"messages\[0\].content", "expected a string, got null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, A]},
            r"messages\[0\].content\[0\]",
            "expected a part of type 'text' with a string, got 'image'; only text can be rendered",
        ),
        (
            {"messages": [U, {"role": "assistant", "content": None, "tool_calls": "add"}]},
            r"messages\[1\].tool_calls",
            "expected a list of calls, got a string",
        ),
        (
            {"messages": [U, {"role": "assistant", "tool_calls": [{"id": 1}]}]},
            r"messages\[1\].tool_calls\[0\]",
            "expected an object with function.name",
        ),
        ({"messages": [U, A], "tools": "{"}, "tools", "expected a list of tool schemas or its JSON text"),
        ({"messages": [U, A], "tools": ["add"]}, "tools", "expected a list of tool schemas"),
        ({"messages": [U, A], "chat_template_kwargs": 1}, "chat_template_kwargs", "expected an object, got a number"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, r"conversations\[0\].from", "unknown role 'bing'"),
        (
            {"conversations": [{"from": "gpt", "value": None}]},
            r"conversations\[0\].value",
            "expected a string, got null",
        ),
        ({"conversations": []}, "conversations", "expected a filled list of turns, got a list"),
        ({"prompt": "p", "completion": ""}, "completion", "the text is empty; fill it or remove the row"),
        ({"prompt": "p", "completion": [A]}, "completion", "expected a string, got a list"),
        ({"prompt": [U], "completion": "c"}, "prompt", "expected a string, got a list"),
        ({"prompt": [U], "completion": [U]}, "completion", "no assistant turn"),
        (
            {"prompt": [A], "completion": [{"role": "assistant", "content": ""}]},
            r"completion\[0\].content",
            "turn is empty",
        ),
        ({"instruction": "", "output": "o"}, "instruction", "the text is empty"),
        ({"instruction": "i", "output": 4}, "output", "expected a string, got a number"),
        ({"instruction": "i", "input": {}, "output": "o"}, "input", "expected a string, got an object"),
        ({"text": "\n"}, "text", "the text is empty"),
        ({"text": True}, "text", "expected a string, got a boolean"),
    ],
)
def test_bad_rows_name_the_field_and_say_what_arrived(row, field, problem):
    with pytest.raises(RowError, match=problem) as caught:
        parse_row(row, row_format_of(row))
    assert caught.value.field == field.replace("\\", "")


def test_a_forced_format_names_the_missing_field():
    with pytest.raises(RowError, match="the field is missing; add it") as caught:
        parse_row({"messages": [U, A]}, "text")
    assert caught.value.field == "text"


def test_digest_covers_what_is_trained_on_and_nothing_else():
    base = digest(parse_row({"messages": [U, A], "id": 1, "source": "x"}, "messages"))
    assert base == digest(
        parse_row({"id": 2, "messages": [{"content": "hi", "role": "user", "name": None}, A]}, "messages")
    )
    others = [
        {"messages": [U, {**A, "content": "hello "}]},
        {"messages": [U, A], "tools": [{"name": "add"}]},
        {"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": [U], "completion": [A]},
    ]
    assert len({base, *(digest(parse_row(row, row_format_of(row))) for row in others)}) == 5


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(RowError, match=r"half of a surrogate pair \('\\ud800'\)"):
        digest(parse_row({"text": "a\ud800"}, "text"))


def test_texts_for_comparison():
    row = {"messages": [{"role": "system", "content": "S"}, U, A, {"role": "user", "content": " Why \n not "}, A]}
    content = parse_row(row, "messages")
    assert prompt_text(content) == "hi why not"
    assert trained_text(content) == "S\nhi\nhello\n Why \n not \nhello"
    assert prompt_text(parse_row({"prompt": " Ask\tme ", "completion": "c"}, "prompt-completion")) == "ask me"
    assert prompt_text(parse_row({"text": "t"}, "text")) == ""
