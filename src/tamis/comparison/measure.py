"""What a model makes of the held-out rows: the loss of each, and whether the answer it writes is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tamis.corpus import Corpus
from tamis.data.batches import collate, plan_batches
from tamis.errors import NonFinite, Unsupported
from tamis.model.loss import evaluation_mode, per_sample_losses
from tamis.model.memory import default_batch_tokens, is_out_of_memory
from tamis.types import IntArray, TokenizedExample

__all__ = ["answer_of", "held_out_losses", "last_answer", "written_answers"]

_BATCH_ROWS = 16  # that answers are written for together


def held_out_losses(model: Any, corpus: Corpus, rows: IntArray, *, batch_tokens: int | None) -> npt.NDArray[np.float64]:
    """Mean cross-entropy of each of ``rows`` over its supervised tokens, in their order.

    Raises:
        NonFinite: a loss is NaN or infinite.
        Unsupported: a batch does not fit in memory.
    """
    device = next(model.parameters()).device
    tokenized, lengths = corpus.take(rows), corpus.lengths[rows]
    losses = np.empty(len(rows), dtype=np.float64)
    most = batch_tokens or default_batch_tokens(device)
    for group in plan_batches(lengths, batch_tokens=most):
        batch = collate(rows[group], [tokenized[i] for i in group], 0).to(device)
        try:
            with torch.no_grad():
                losses[group] = per_sample_losses(model, batch).double().cpu().numpy()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise Unsupported(
                f"measuring held-out rows: {len(group)} rows of up to {int(lengths[group].max())} tokens do not fit in "
                "memory; run again with a smaller --batch-tokens or --max-length"
            ) from error
    bad = rows[~np.isfinite(losses)]
    if len(bad):
        raise NonFinite(
            f"the loss of held-out row '{corpus.examples.ids[int(bad[0])]}' ({len(bad)} in all) is not finite after "
            "training; lower --learning-rate, or use --dtype float32",
            rows=tuple(int(row) for row in bad),
        )
    return losses


def written_answers(model: Any, tokenizer: Any, corpus: Corpus, rows: IntArray, *, max_tokens: int) -> list[str]:
    """What the model writes, greedily, in place of each row's last answer.

    Rows that are generated together are padded on the left; the answer ends at the end of the turn, or after
    ``max_tokens`` tokens.
    """
    device = next(model.parameters()).device
    examples = corpus.take(rows)
    prompts = [example.input_ids[: _answer_start(example)] for example in examples]
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    answers = [""] * len(rows)
    ends = _end_tokens(model, tokenizer, examples)
    for first in range(0, len(order), _BATCH_ROWS):
        group = order[first : first + _BATCH_ROWS]
        width = max(len(prompts[i]) for i in group)
        ids = np.zeros((len(group), width), dtype=np.int64)
        mask = np.zeros((len(group), width), dtype=np.int64)
        for place, i in enumerate(group):
            ids[place, width - len(prompts[i]) :] = prompts[i]
            mask[place, width - len(prompts[i]) :] = 1
        with torch.no_grad(), evaluation_mode(model):
            written = model.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=ends[0] if ends else 0,
                **({"eos_token_id": ends} if ends else {}),
            )
        for place, i in enumerate(group):
            answers[int(i)] = tokenizer.decode(written[place, width:].tolist(), skip_special_tokens=True).strip()
    return answers


def last_answer(tokenizer: Any, example: TokenizedExample) -> str:
    """The answer that the row itself gives where ``written_answers`` lets the model write."""
    return str(tokenizer.decode(example.input_ids[_answer_start(example) :].tolist(), skip_special_tokens=True)).strip()


def answer_of(text: str, pattern: str | None) -> str:
    """The part of a text that counts: the last match of ``pattern`` (its first group, if it has one), else all of it.

    Upper and lower case and white space make no difference. A text without a match has the empty answer, which is
    never right.
    """
    if pattern is not None:
        found = list(re.finditer(pattern, text))
        text = (found[-1].group(1 if found[-1].re.groups else 0) or "") if found else ""
    return " ".join(text.casefold().split())


def _answer_start(example: TokenizedExample) -> int:
    """Where the last run of supervised tokens begins: after the prompt of the last answer."""
    marks = np.flatnonzero(example.supervised)
    breaks = np.flatnonzero(np.diff(marks) > 1)
    return max(1, int(marks[breaks[-1] + 1] if len(breaks) else marks[0]))


def _end_tokens(model: Any, tokenizer: Any, examples: Sequence[TokenizedExample]) -> Sequence[int]:
    """Ids that end an answer: the tokenizer's, those of the model's generation settings, and those of the rows.

    A base model's tokenizer often ends texts by another token than the chat template ends turns by. A row's end is the
    special token that its last answer ends in, or that follows it where the loss leaves it out.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    special = {int(token) for token in tokenizer.all_special_ids}
    special |= {int(token) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for example in examples:
        last = int(np.flatnonzero(example.supervised)[-1])
        closing = [int(token) for token in example.input_ids[last : last + 2] if int(token) in special]
        found += closing[:1]
    return list(dict.fromkeys(int(token) for token in found if token is not None))
