from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_tokenizers import TEMPLATES, metaspace_tokenizer, tiny_tokenizer
from tamis.data.formats import parse_row, row_format_of
from tamis.data.render import Renderer
from tamis.errors import BadRow, InvalidInput, InvalidSettings, Unsupported
from tamis.types import Example

LONG = 10_000
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def example(row: dict) -> Example:
    content = parse_row(row, row_format_of(row))
    return Example(index=0, id="x", file="rows.jsonl", row=3, source="rows", raw=row, **vars(content))


def chat(*turns: tuple[str, object], **extra) -> Example:
    return example({"messages": [{"role": role, "content": content} for role, content in turns], **extra})


def labelled(template: str, row: Example, **options) -> list[str]:
    """The pieces of the text that carry loss."""
    pieces = Renderer(tiny_tokenizer(template, **options), max_length=LONG).preview(row)
    return [text for text, supervised in pieces if supervised]


TWO_TURNS = chat(("user", "What?"), ("assistant", " Paris é😀 "), ("user", "Why?"), ("assistant", "Because.\n"))

# What two answers, " Paris é😀 " and "Because.\n", become, end of turn included.
EXPECTED = {
    "chatml": [" Paris é😀 <|im_end|>\n", "Because.\n<|im_end|>\n"],
    "marked": [" Paris é😀 <|im_end|>", "Because.\n<|im_end|>"],
    "default system": [" Paris é😀 <|im_end|>\n", "Because.\n<|im_end|>\n"],
    "instruct": [" Paris é😀</s>", " Because.</s>"],
    "header": ["Paris é😀<|eot_id|>", "Because.<|eot_id|>"],
    "model role": ["Paris é😀<end_of_turn>\n", "Because.<end_of_turn>\n"],
    "thinking": [" Paris é😀 <|im_end|>\n", "<think>\n\n</think>\n\nBecause.\n<|im_end|>\n"],
    "open turns": ["\n Paris é😀 <|user|>", "\nBecause.\n"],
    "closed text": [" Paris é😀 <|end|>\n", "Because.\n<|end|>\n</s>"],
    "by number": [" Paris é😀 <|im_end|>\n", "Because.\n<|im_end|>\n"],
}


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("template", EXPECTED)
def test_labels_run_from_the_prompt_to_the_end_of_the_turn(template, trim_offsets):
    assert labelled(template, TWO_TURNS, trim_offsets=trim_offsets) == EXPECTED[template]


@pytest.mark.parametrize("template", EXPECTED)
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, metaspace_tokenizer], ids=["byte level", "metaspace"])
def test_ids_are_those_of_apply_chat_template(template, tokenizer):
    made = tokenizer(template)
    rendered = Renderer(made, max_length=LONG).render(TWO_TURNS)
    expected = made.apply_chat_template(list(TWO_TURNS.messages), tokenize=True, return_dict=True)["input_ids"]
    assert rendered.input_ids.tolist() == expected
    assert rendered.input_ids.dtype == np.int32 and rendered.supervised.dtype == np.bool_
    assert rendered.truncated == 0 and len(rendered.supervised) == len(expected)


@pytest.mark.parametrize("template", EXPECTED)
def test_preview_is_the_whole_text(template):
    tokenizer = tiny_tokenizer(template)
    text = tokenizer.apply_chat_template(list(TWO_TURNS.messages), tokenize=False)
    assert "".join(piece for piece, _ in Renderer(tokenizer, max_length=LONG).preview(TWO_TURNS)) == text


hostile = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "assistant", "\n", " ", "user", "Paris", "é😀", "{{ x }}", "</s>"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    min_size=1,
    max_size=8,
).map("".join)
CHATML, HEADER = (Renderer(tiny_tokenizer(name), max_length=LONG) for name in ("chatml", "header"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(hostile, hostile.filter(str.strip)), min_size=1, max_size=3))
def test_no_content_is_mistaken_for_structure(turns):
    row = chat(*[turn for question, answer in turns for turn in (("user", question), ("assistant", answer))])
    pieces = CHATML.preview(row)
    assert [text for text, supervised in pieces if supervised] == [f"{answer}<|im_end|>\n" for _, answer in turns]
    pieces = HEADER.preview(row)
    assert [text for text, supervised in pieces if supervised] == [f"{answer.strip()}<|eot_id|>" for _, answer in turns]


def test_private_use_characters_in_the_content_do_not_disturb_the_marks():
    odd = "a\U0010fb10t0,1\U0010fb11b\U0010fb10g1\U0010fb11"
    row = chat(("user", odd), ("assistant", odd))
    assert labelled("chatml", row) == [f"{odd}<|im_end|>\n"]
    assert labelled("marked", row, trim_offsets=False) == [f"{odd}<|im_end|>"]


def test_system_and_tool_turns_carry_no_label():
    row = example(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "1 + 1?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "assistant\n2"},
                {"role": "assistant", "content": "<think>sum</think>\n\n2"},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes"},
            ]
        }
    )
    call = '{"name": "add", "arguments": {"a": 1}}'
    expected = [
        f"\n<tool_call>{call}</tool_call><|im_end|>\n",
        "2<|im_end|>\n",
        "<think>\n\n</think>\n\nYes<|im_end|>\n",
    ]
    # The template reads message['content'], which a null leaves undefined.
    assert (
        labelled(TEMPLATES["thinking"].replace("= message['content'] %}", "= message['content'] or '' %}"), row)
        == expected
    )


def test_reasoning_is_kept_in_the_last_answer_only():
    thought = "<think>\nhm\n</think>\n\nParis"
    row = chat(("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought))
    assert labelled("thinking", row) == ["Paris<|im_end|>\n", f"{thought}<|im_end|>\n"]


@pytest.mark.parametrize("template", ["marked", "chatml"])
def test_consecutive_answers_each_carry_labels(template):
    tail = "<|im_end|>" if template == "marked" else "<|im_end|>\n"
    row = chat(("user", "q"), ("assistant", "one"), ("assistant", "two"))
    assert labelled(template, row) == [f"one{tail}", f"two{tail}"]


def test_instruction_rows_are_labelled_like_chats():
    row = example({"instruction": "Add.", "input": "1 1", "output": "2"})
    same = chat(("user", "Add.\n\n1 1"), ("assistant", "2"))
    renderer = Renderer(tiny_tokenizer(), max_length=LONG)
    assert renderer.preview(row) == renderer.preview(same)


def test_plain_strings_get_special_tokens_and_an_end():
    renderer = Renderer(metaspace_tokenizer(), max_length=LONG)
    row = example({"prompt": "What is ", "completion": "Paris"})
    assert renderer.preview(row) == [("<s>What is", False), (" Paris</s>", True)]
    assert renderer.preview(example({"text": "What</s>"})) == [("<s>What</s>", True)]


def test_parts_are_joined_where_the_template_wants_a_string():
    parts = [{"type": "text", "text": "Par"}, {"type": "text", "text": "is"}]
    row = chat(("user", parts), ("assistant", parts))
    assert labelled("chatml", row) == ["Paris<|im_end|>\n"]
    # This template adds a bar after each part, so it must have been given them.
    by_part = (
        "{% for message in messages %}<{{ message.role }}>"
        "{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{{ part.text + '|' }}{% endfor %}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert Renderer(tiny_tokenizer(by_part), max_length=LONG).preview(
        chat(("user", parts), ("assistant", parts[:1]))
    ) == [
        ("<user>Par|is|</s><assistant>", False),
        ("Par|</s>", True),
    ]


def test_tools_and_template_variables_of_a_row_reach_the_template():
    template = "{{ tools | tojson if tools else '-' }}{{ mood | default('calm') }}" + TEMPLATES["chatml"]
    renderer = Renderer(tiny_tokenizer(template), max_length=LONG)
    turns = (("user", "q"), ("assistant", "a"))
    row = chat(*turns, tools=[{"name": "add"}], chat_template_kwargs={"mood": "glad"})
    assert renderer.preview(row)[0][0].startswith('[{"name": "add"}]glad<|im_start|>')
    assert renderer.preview(chat(*turns))[0][0].startswith("-calm<|im_start|>")


def test_a_renderer_knows_whether_its_template_writes_tools():
    assert not Renderer(tiny_tokenizer(), max_length=LONG).writes_tools
    assert Renderer(tiny_tokenizer("{{ tools }}" + TEMPLATES["chatml"]), max_length=LONG).writes_tools
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": "{{ tools }}" + TEMPLATES["chatml"]}
    assert Renderer(tokenizer, max_length=LONG).writes_tools


def test_a_tokenizer_with_a_template_for_tools_uses_it_for_rows_with_tools():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["header"]}
    renderer = Renderer(tokenizer, max_length=LONG)
    turns = (("user", "q"), ("assistant", "a"))
    assert renderer.preview(chat(*turns))[-1][0] == "a<|im_end|>\n"
    assert renderer.preview(chat(*turns, tools=[{"name": "add"}]))[-1][0] == "a<|eot_id|>"


def test_truncation_cuts_the_end_and_is_counted():
    tokenizer = tiny_tokenizer()
    whole = Renderer(tokenizer, max_length=LONG).render(TWO_TURNS)
    for length in (2, 12, len(whole.input_ids) - 1, len(whole.input_ids)):
        cut = Renderer(tokenizer, max_length=length).render(TWO_TURNS)
        assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
        assert cut.supervised.tolist() == whole.supervised[:length].tolist()
        assert cut.truncated == len(whole.input_ids) - length
    assert Renderer(tokenizer, max_length=5).render(TWO_TURNS).num_supervised == 0


@pytest.mark.parametrize(
    ("template", "row", "field", "problem"),
    [
        ("shouting", TWO_TURNS, "messages[1]", "the chat template rewrites or drops this answer"),
        ("forgetful", TWO_TURNS, "messages[1]", "the chat template leaves this answer out"),
        ("by number, rewriting", TWO_TURNS, "messages[1]", "cannot tell which part of the text this answer is"),
        (
            "model role",
            chat(("system", "s"), ("user", "q"), ("assistant", "a")),
            "messages[0]",
            "System role not supported; change it or use another template",
        ),
        (
            "model role",
            example({"system": "s", "instruction": "i", "output": "o"}),
            "system",
            "System role not supported",
        ),
        (
            "model role",
            example(
                {
                    "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
                    "completion": [{"role": "assistant", "content": "a"}],
                }
            ),
            "prompt[0]",
            "System role not supported",
        ),
        (
            "model role",
            chat(("system", "s"), ("user", "q"), ("user", "q"), ("assistant", "a")),
            "messages",
            "System role not supported",
        ),
        ("shouting", example({"system": "S", "instruction": "I", "output": "o"}), "output", "rewrites or drops"),
        ("model role", chat(("user", "q"), ("user", "q"), ("assistant", "a")), "messages", "Roles must alternate"),
        ("default system", chat(("assistant", "a")), "messages[0]", "cannot tell where this answer begins"),
        ("thinking", chat(("user", "q"), ("assistant", "<think>all</think>")), None, None),
        (
            "thinking",
            chat(("user", "q"), ("assistant", "<think>all</think>"), ("user", "q"), ("assistant", "a")),
            "messages[1]",
            "rewrites or drops this answer",
        ),
        (
            "chatml",
            example(
                {
                    "messages": [
                        {"role": "user", "content": "q"},
                        {"role": "assistant", "content": "a", "tool_calls": [CALL]},
                    ]
                }
            ),
            "messages[1]",
            "the chat template does not write the call of 'add'",
        ),
        ("shouting", example({"instruction": "i", "output": "o"}), "output", "rewrites or drops"),
        (
            "shouting",
            example({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            "conversations[1]",
            "rewrites or drops",
        ),
        (
            "shouting",
            example(
                {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
            ),
            "completion[0]",
            "rewrites or drops",
        ),
    ],
)
def test_templates_that_cannot_be_followed_are_refused_with_the_turn(template, row, field, problem):
    if problem is None:
        assert labelled(template, row) == ["<think>\nall\n</think>\n\n<|im_end|>\n"]
        return
    with pytest.raises(BadRow, match=rf"rows.jsonl, row 3 \(0-based\), field '.*': .*{problem}") as caught:
        labelled(template, row)
    assert caught.value.field == field


THOUGHT = "<think>\nlet me see\n</think>\n\nParis"


@pytest.mark.parametrize(
    ("template", "row", "dropped"),
    [
        ("chatml", chat(("user", "q"), ("assistant", THOUGHT)), False),
        ("thinking", chat(("user", "q"), ("assistant", THOUGHT)), False),
        # Only the last turn keeps its reasoning.
        ("thinking", chat(("user", "q"), ("assistant", THOUGHT), ("user", "q"), ("assistant", "a")), True),
        ("thinking", chat(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", THOUGHT)), False),
        ("header", chat(("user", "q"), ("assistant", "  <b>a</b> c ")), False),
        *(
            (
                "chatml",
                example({"messages": [U, {"role": "assistant", "content": "Paris", name: reasoning}]}),
                reasoning == "let me see",
            )
            for name in ("reasoning_content", "thinking", "reasoning")
            for reasoning in ("let me see", " ", None)
        ),
        ("chatml", example({"prompt": [U], "completion": [{**A, "reasoning_content": "let me see"}]}), True),
        ("marked", example({"messages": [U, {**A, "reasoning_content": "let me see"}]}), True),
    ],
)
def test_text_of_an_answer_that_the_template_leaves_out_is_noticed(template, row, dropped):
    assert Renderer(tiny_tokenizer(template), max_length=LONG).render(row).dropped is dropped


def test_marks_that_cover_nothing_are_refused():
    template = TEMPLATES["marked"].replace("== 'assistant'", "== 'nobody'")
    with pytest.raises(BadRow, match="marks nothing of this chat as generated"):
        labelled(template, TWO_TURNS)


def test_marks_inside_a_trimmed_block_fall_back_on_transformers_own_mask():
    # Trimming the captured text would also trim the marks, so the marked text is not believed here.
    template = (
        "{% for message in messages %}{% set turn %}{% if message['role'] == 'assistant' %}"
        "{% generation %} {{ message['content'] }} {% endgeneration %}{% else %} {{ message['content'] }} {% endif %}"
        "{% endset %}{{ turn | trim }}</s>{% endfor %}"
    )
    tokenizer = tiny_tokenizer(template, trim_offsets=False)
    rendered = Renderer(tokenizer, max_length=LONG).render(TWO_TURNS)
    theirs = tokenizer.apply_chat_template(
        list(TWO_TURNS.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered.input_ids.tolist() == theirs["input_ids"]
    assert rendered.supervised.tolist() == [bool(m) for m in theirs["assistant_masks"]]


@pytest.mark.parametrize(("eos", "end"), [("</s>", "</s>"), ("<|im_end|>", "<|im_end|>")])
def test_a_tokenizer_without_template_gets_the_stated_default(eos, end):
    tokenizer = tiny_tokenizer(None, eos=eos)
    if eos == "</s>":
        tokenizer = metaspace_tokenizer(None)
        tokenizer.get_vocab = lambda: {"</s>": 2}
    renderer = Renderer(tokenizer, max_length=LONG)
    assert (
        f"no chat template: chats are written in the ChatML form <|im_start|>role, line break, content, {end}"
        in " ".join(renderer.notes)
    )
    pieces = renderer.preview(chat(("user", "q"), ("assistant", "a")))
    assert pieces == [(f"<|im_start|>user\nq{end}\n<|im_start|>assistant\n", False), (f"a{end}\n", True)]


def test_the_default_template_writes_tool_calls():
    row = example({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [CALL]}]})
    pieces = Renderer(tiny_tokenizer(None), max_length=LONG).preview(row)
    assert pieces[-1] == (f"\n<tool_call>\n{json.dumps(CALL)}\n</tool_call><|im_end|>\n", True)


def test_unusable_templates_and_tokenizers_are_refused():
    with pytest.raises(InvalidInput, match="the chat template does not compile"):
        Renderer(tiny_tokenizer("{% for %}"), max_length=LONG)
    with pytest.raises(InvalidSettings, match="max_length=1: expected 2 or more"):
        Renderer(tiny_tokenizer(), max_length=1)
    slow = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(
        Unsupported, match=r"SlowTokenizer is not a fast one .* use a model folder with a tokenizer.json"
    ):
        Renderer(slow, max_length=LONG)


def test_templates_run_in_a_sandbox():
    escape = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    with pytest.raises(BadRow, match="the chat template refuses this chat: access to attribute '__class__'"):
        labelled(escape, TWO_TURNS)


def test_identity_follows_all_that_decides_ids_and_labels():
    base = Renderer(tiny_tokenizer(), max_length=8).identity
    assert base == Renderer(tiny_tokenizer(), max_length=8).identity
    assert base["algorithm"] == "render-v2"
    used = tiny_tokenizer()
    used(["some text", "more"], padding=True, truncation=True, max_length=3)
    assert Renderer(used, max_length=8).identity == base
    for other, key in [
        (Renderer(tiny_tokenizer(), max_length=9), "max_length"),
        (Renderer(tiny_tokenizer("header"), max_length=8), "chat_template"),
        (Renderer(metaspace_tokenizer("chatml"), max_length=8), "tokenizer"),
        (Renderer(tiny_tokenizer(eos="<|im_end|>"), max_length=8), "special_tokens"),
    ]:
        assert [k for k in base if other.identity[k] != base[k]] == [key]
    dated = Renderer(tiny_tokenizer("{{ strftime_now('%Y') }}" + TEMPLATES["chatml"]), max_length=8)
    assert "date" in dated.identity and "date" not in base
    assert "writes today's date" in dated.notes[0]


def test_notes_say_what_had_to_be_assumed():
    assert "no generation prompt of its own" in Renderer(tiny_tokenizer("instruct"), max_length=8).notes[0]
    assert "writes no end-of-turn token" in Renderer(tiny_tokenizer("open turns"), max_length=8).notes[0]
    assert Renderer(tiny_tokenizer("chatml"), max_length=8).notes == ()
