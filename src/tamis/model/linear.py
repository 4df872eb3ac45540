"""Which modules are linear layers: those that multiply what they are given by their one matrix, and do no more."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["is_linear"]

_TRIED: dict[tuple[type[nn.Module], torch.Size], bool] = {}  # large matrices take a while


def is_linear(module: nn.Module) -> bool:
    """True for an ``nn.Linear`` or ``Conv1D`` whose output is its input times its matrix, plus its bias.

    A class of its own may do otherwise under that name: routers (Phimoe, Llama 4) choose experts as well, and
    DeepSeek V4 multiplies groups of features by parts of the matrix. Such a class is tried on small numbers.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if isinstance(module, Conv1D):
        return False
    key = type(module), module.weight.shape
    if key not in _TRIED:
        _TRIED[key] = _gives_the_product(module)
    return _TRIED[key]


@torch.no_grad()
def _gives_the_product(module: nn.Linear) -> bool:
    """Tried with numbers of its own: the module's may be anywhere, of any type, and all zero."""
    generator = torch.Generator().manual_seed(0)
    outs, ins = module.weight.shape
    own = {"weight": torch.randn(outs, ins, generator=generator)}
    if module.bias is not None:
        own["bias"] = torch.randn(outs, generator=generator)
    x = torch.randn(1, 2, ins, generator=generator)
    training = module.training
    module.eval()  # jitter and dropout are of training
    try:
        found = torch.func.functional_call(module, own, (x,))
    except (RuntimeError, ValueError, TypeError, IndexError):  # it wants something else
        return False
    finally:
        module.train(training)
    expected = nn.functional.linear(x, own["weight"], own.get("bias"))
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3)
