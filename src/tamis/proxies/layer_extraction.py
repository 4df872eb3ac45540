"""The baseline that leaves whole blocks out: those that change their input least.

After *ShortGPT* (Men et al., 2024), as *IProX* uses it (appendix A.1): a block matters as much as ``1 - cos`` of the
states before and after it, averaged over real tokens. The last block always stays. What a block gives is taken at the
block itself: a model's own list of hidden states has its last entry behind the final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tamis.errors import Unsupported
from tamis.model.blocks import Decoder
from tamis.model.loss import per_sample_losses
from tamis.model.targets import embedding_matrix
from tamis.proxies.assemble import copy_with
from tamis.types import Batch

__all__ = ["block_importance", "blocks_to_keep", "extract_blocks"]

# What Transformers' configs say of single blocks: one entry for each, or the numbers of some.
_BLOCK_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
_BLOCK_NUMBERS = ("mlp_only_layers",)


def block_importance(model: nn.Module, batches: Sequence[Batch]) -> list[float]:
    """``1 - cos(h_in, h_out)`` of every block, averaged over the real tokens of ``batches``."""
    blocks = Decoder.of(model).blocks
    totals = [0.0] * len(blocks)
    tokens = 0
    for batch in batches:
        batch = batch.to(embedding_matrix(model).device)
        real = batch.attention_mask.bool()
        tokens += int(real.sum())

        def hook(index: int, real: Tensor) -> Any:
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                after = output[0] if isinstance(output, tuple) else output
                cosines = nn.functional.cosine_similarity(before[real].float(), after[real].float(), dim=-1)
                totals[index] += float((1 - cosines).sum())

            return note

        handles = [
            block.register_forward_hook(hook(index, real), with_kwargs=True) for index, block in enumerate(blocks)
        ]
        try:
            with torch.no_grad():
                per_sample_losses(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return [total / tokens for total in totals]


def blocks_to_keep(importance: Sequence[float], sparsity: float) -> list[int]:
    """The most important blocks in their order, about ``1 - sparsity`` of them, the last one always among them."""
    count = max(1, round((1 - sparsity) * len(importance)))
    last = len(importance) - 1
    others = sorted(range(last), key=lambda index: (-importance[index], index))
    return sorted([*others[: count - 1], last])


def extract_blocks(model: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A model of these blocks alone, numbered anew; it shares their tensors and is an ordinary model of its family.

    Raises:
        Unsupported: the config makes blocks differ by their number in a way that cannot be written for fewer blocks.
    """
    decoder = Decoder.of(model)
    blocks = decoder.blocks
    # The dropped blocks are never copied; the list that holds the others is made by hand.
    shorter = copy_with(decoder.model, {id(blocks): nn.ModuleList([copy_with(blocks[index], {}) for index in kept])})
    for number, block in enumerate(_blocks_of(shorter, decoder)):
        for module in block.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, number)
    _shorten(shorter, kept)
    _check_config(shorter)
    return shorter


def _check_config(shorter: nn.Module) -> None:
    """Stop if the config would make other blocks than the model has: its folder would load to other numbers."""
    with torch.device("meta"):
        made = type(shorter)(copy.deepcopy(shorter.config))
    own, theirs = (Decoder.of(model).blocks for model in (shorter, made))
    shapes = [{name: tuple(param.shape) for name, param in blocks.named_parameters()} for blocks in (own, theirs)]
    settings = [_plain_settings(blocks) for blocks in (own, theirs)]
    differing = (shapes[0].items() ^ shapes[1].items()) or (settings[0].items() ^ settings[1].items())
    if differing:
        first = min(name for name, _ in differing)
        raise Unsupported(
            f"{type(shorter).__name__}: its config cannot describe these blocks alone (block '{first}' would be "
            "another one when the folder is loaded); layer-extraction does not work on this family, take another preset"
        )


def _plain_settings(model: nn.Module) -> dict[str, Any]:
    """What modules hold beside tensors, such as whether an attention turns positions, by qualified name."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key != "training" and not key.startswith("_") and isinstance(value, (bool, int, float, str))
    }


def _blocks_of(model: nn.Module, decoder: Decoder) -> nn.ModuleList:
    """The blocks of a copy, whose config does not yet say how many it has."""
    found = getattr(model.get_submodule(decoder.stack_name), decoder.list_name)
    assert isinstance(found, nn.ModuleList)
    return found


def _shorten(model: nn.Module, kept: Sequence[int]) -> None:
    done: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None:
            continue
        if id(config) not in done:
            done[id(config)] = changed = copy.deepcopy(config)
            done[id(changed)] = changed
            text = changed.get_text_config() if hasattr(changed, "get_text_config") else changed
            number = text.num_hidden_layers
            text.num_hidden_layers = len(kept)
            for name, value in vars(text).items():
                if name in _BLOCK_NUMBERS and value is not None:
                    setattr(text, name, [kept.index(index) for index in value if index in kept])
                elif name in _BLOCK_LISTS and value and len(value) == number:
                    setattr(text, name, [value[index] for index in kept])
        vars(module)["config"] = done[id(config)]
