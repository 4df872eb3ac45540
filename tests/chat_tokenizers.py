"""Tiny fast tokenizers built from code, and chat templates of the forms that are met in the wild.

The templates are written here from scratch, each with the trait it is named for; none is a copy of a model's file.
"""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.",
    "system user assistant tool model You are a helpful assistant. Answer the question in one sentence.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "1 + 1 = 2, 2 + 2 = 4, 12 x 3 = 36.\n#### 36\n",
)

SPECIAL = (
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
)

_CHATML_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

TEMPLATES = {
    "chatml": "{% for message in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_PROMPT,
    "marked": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{{ '\\n' }}{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _CHATML_PROMPT
    ),
    # A system turn of its own where the chat has none, written inside the loop, before the first message.
    "default system": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        + _CHATML_TURN
        + "{% endfor %}"
        + _CHATML_PROMPT
    ),
    # No generation prompt, answers closed by the end-of-sequence token, system text moved into the first question.
    "instruct": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
    ),
    "header": (
        "{% for message in messages %}"
        "{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim"
        " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # The assistant goes by another name, there is no system role, turns must alternate, content is trimmed.
    "model role": (
        "{{ bos_token }}"
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # Reasoning is kept in the last answer only, which always has a place for it.
    "thinking": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% set content = message['content'] %}{% set thought = '' %}{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.last %}{{ '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}"
        "{% else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}"
        "{% for call in message.tool_calls or [] %}"
        "{{ '\\n<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}"
        "{% elif message['role'] == 'tool' %}"
        "{{ '<|im_start|>user\\n<tool_response>' + message['content'] + '</tool_response><|im_end|>\\n' }}"
        "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_PROMPT
    ),
    # The end of an answer is the token that opens the next turn.
    "open turns": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    # The whole text ends with the end-of-sequence token, after the loop.
    "closed text": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # Loops over numbers, so that no loop variable is a message.
    "by number": (
        "{% for i in range(messages | length) %}{% set message = messages[i] %}"
        + _CHATML_TURN
        + "{% endfor %}"
        + _CHATML_PROMPT
    ),
    # As before, and earlier answers change once another turn follows.
    "by number, rewriting": (
        "{% for i in range(messages | length) %}{% set message = messages[i] %}"
        "{% if i + 1 < messages | length and message['role'] == 'assistant' %}"
        "{{ '<|im_start|>earlier\\n' + message['content'] }}"
        "{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_PROMPT
    ),
    "shouting": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | upper + '<|im_end|>\\n' }}"
        "{% endfor %}" + _CHATML_PROMPT
    ),
    "forgetful": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        + _CHATML_TURN
        + "{% endif %}{% endfor %}"
        + _CHATML_PROMPT
    ),
}


def tiny_tokenizer(
    template: str | None = "chatml", *, bos: str = "<s>", eos: str = "</s>", trim_offsets: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens; ``template`` is a key of ``TEMPLATES`` or a template.

    With ``trim_offsets`` a token's offsets leave out its leading space, as in Llama 3 and GPT-2; not so in Qwen.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level()), bos_token=bos, eos_token=eos, pad_token="<pad>"
    )
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.chat_template = TEMPLATES.get(template, template) if template else None
    return tokenizer


def metaspace_tokenizer(template: str | None = "instruct") -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece: spaces become part of words, and BOS is put before plain text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_metaspace()), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATES.get(template, template) if template else None
    return tokenizer


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    return tokenizer.to_str()


@cache
def _metaspace() -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=["<unk>", *[AddedToken(token, special=True) for token in SPECIAL], *byte_tokens],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return tokenizer.to_str()
