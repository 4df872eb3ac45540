"""Every layer's factors, one layer after the other, each a file of its own as soon as it is done.

A killed build goes on with the layers that are missing and ends in the same bytes: probes depend on the seed and the
rows alone, and a pass always serves the same layers. In memory are the model, the probes of one pass, and one layer.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tamis.disk import make_folder, replace_atomically
from tamis.errors import InvalidSettings, first_line
from tamis.maths.moment_roots import MomentRoot, core_root, damping_of, dense_root, identity_root, probe_root
from tamis.maths.rank_budget import LayerSpectrum, rank_for, share_ranks
from tamis.maths.weighted_svd import WeightedFactors, balance, weighted_svd
from tamis.proxies.probes import LayerProbes, collect_probes, count_probes, passes_within
from tamis.settings.proxy import Recipe
from tamis.types import Batch, LayerSpec

__all__ = ["Decomposed", "decompose", "factor_layer"]

logger = logging.getLogger(__name__)

_SECONDS = "seconds.txt"
_FORMS = {"probe": probe_root, "dense": dense_root, "core": core_root}
_FLOAT64_UP_TO = 512  # wider layers are decomposed in float32, which agrees to many more digits than are kept
_RANDOMISED_FROM, _RANDOMISED_BELOW = 2048, 0.25  # smaller side; share of it that the rank may be


@dataclass(frozen=True, kw_only=True)
class Decomposed:
    """The factors on disk, from which a proxy of any sparsity down to the stored rank can be made."""

    folder: Path
    layers: tuple[LayerSpec, ...]
    recipe: Recipe
    probes: int
    seconds: float  # that probes and factors took, over all runs that were needed
    notes: tuple[str, ...]

    def ranks(self, sparsity: float) -> dict[str, int]:
        """The rank of every layer that gets smaller; the others are not among them."""
        if self.recipe.allocation == "share":
            ranks = share_ranks([self._spectrum(index) for index in range(len(self.layers))], sparsity)
        else:
            ranks = [rank_for(sparsity, layer.out_features, layer.in_features) for layer in self.layers]
        return {
            layer.name: rank
            for layer, rank in zip(self.layers, ranks, strict=True)
            if rank * (layer.out_features + layer.in_features) < layer.out_features * layer.in_features
        }

    def factors(self, ranks: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
        """``A (O, R)`` and ``B (R, I)`` of the layers in ``ranks``, in the recipe's gauge."""
        found = {}
        for index, layer in enumerate(self.layers):
            if layer.name in ranks:
                rank = ranks[layer.name]
                with safe_open(_file(self.folder, index), framework="pt") as file:
                    left, right = file.get_tensor("A")[:, :rank], file.get_tensor("B")[:rank]
                if self.recipe.gauge == "balanced":
                    dtype = _working_dtype(layer.out_features, layer.in_features)
                    left, right = (x.float() for x in balance(left.to(dtype), right.to(dtype)))
                found[layer.name] = (left.contiguous(), right.contiguous())
        return found

    def _spectrum(self, index: int) -> LayerSpectrum:
        layer = self.layers[index]
        with safe_open(_file(self.folder, index), framework="pt") as file:
            values = file.get_tensor("values").double().numpy()
        return LayerSpectrum(rows=layer.out_features, columns=layer.in_features, values=np.array(values))


def decompose(
    model: nn.Module,
    layers: Sequence[LayerSpec],
    batches: Sequence[Batch],
    *,
    recipe: Recipe,
    lowest_sparsity: float,
    tokens_per_row: int,
    probe_gb: float,
    seed: int,
    folder: Path,
    advance: Callable[[int], None],
) -> Decomposed:
    """Write the factors of ``layers`` to ``folder``, those that are not there yet.

    Args:
        model: the target.
        layers: of ``find_compressible``.
        batches: the probe rows.
        recipe: form, weighting and damping.
        lowest_sparsity: the least that will be asked of them; it sets the rank that is stored.
        tokens_per_row: of the probe rows.
        probe_gb: bound on the probes held at once.
        seed: of the tokens drawn.
        folder: of this build alone.
        advance: told of every layer that is done.

    Raises:
        InvalidSettings: the core form has fewer probes than a layer's rank.
    """
    make_folder(folder)
    for leftover in folder.glob(".*.tmp"):  # of a build that was killed while it wrote
        leftover.unlink(missing_ok=True)
    probes = count_probes(batches, tokens_per_row)
    place = {layer.name: index for index, layer in enumerate(layers)}
    modules = dict(model.named_modules())
    weighs = recipe.weigh_input or recipe.weigh_output
    for group in passes_within(layers, probes, gigabytes=probe_gb):
        missing = [layer for layer in group if not _is_done(_file(folder, place[layer.name]))]
        advance(len(group) - len(missing))
        if not missing:
            continue
        started = time.perf_counter()
        found: dict[str, LayerProbes] = {}
        if weighs:
            found = collect_probes(
                model, group, batches, tokens_per_row=tokens_per_row, seed=seed, advance=lambda rows: None
            )
        for layer in missing:
            rank = min(layer.out_features, layer.in_features)
            if recipe.allocation == "uniform":
                rank = rank_for(lowest_sparsity, layer.out_features, layer.in_features)
            weight = _matrix(modules[layer.name])
            factors, notes = factor_layer(layer, weight, found.get(layer.name), recipe=recipe, rank=rank, seed=seed)
            _write(_file(folder, place[layer.name]), factors, notes)
            found.pop(layer.name, None)
            with (folder / _SECONDS).open("a", encoding="utf-8") as file:
                file.write(f"\n{time.perf_counter() - started:.6f}\n")  # a killed write is still a number
            started = time.perf_counter()
            advance(1)
    said = [note for index in range(len(layers)) for note in _notes(_file(folder, index))]
    return Decomposed(
        folder=folder,
        layers=tuple(layers),
        recipe=recipe,
        probes=probes,
        seconds=_seconds(folder),
        notes=tuple(said),
    )


def factor_layer(
    layer: LayerSpec, weight: Tensor, probes: LayerProbes | None, *, recipe: Recipe, rank: int, seed: int
) -> tuple[WeightedFactors, list[str]]:
    """Unbalanced factors of one layer's ``(O, I)`` matrix, and what is to be said about them.

    Raises:
        InvalidSettings: the core form has fewer probes than the rank.
    """
    dtype = _working_dtype(*weight.shape)
    device = weight.device if weight.device.type == "cuda" else torch.device("cpu")
    weight = weight.to(device, dtype)
    notes: list[str] = []
    roots: list[MomentRoot] = []
    sides = (
        ("output", recipe.weigh_output, recipe.damping_output, layer.out_features),
        ("input", recipe.weigh_input, recipe.damping_input, layer.in_features),
    )
    for side, weighs, damping, size in sides:
        if not weighs:
            roots.append(identity_root(size, like=weight))
            continue
        assert probes is not None
        tokens = (probes.grads if side == "output" else probes.inputs).to(device, dtype)
        if recipe.form == "core" and len(tokens) < rank:
            raise InvalidSettings(
                f"form='core': layer '{layer.name}' of rank {rank} has {len(tokens)} probe tokens, and the core form "
                "keeps at most as many directions as there are; raise --probe-rows or --probe-tokens, or use form=probe"
            )
        if not bool(tokens.any()):
            notes.append(f"'{layer.name}': all its {side} probes are zero, so its {side} side is not weighted")
            roots.append(identity_root(size, like=weight))
            continue
        if damping is None:
            damping = _damping_for(len(tokens), size)
        damped = damping_of(tokens.T, damping, relative=recipe.damping == "relative")
        roots.append(_FORMS[recipe.form](tokens.T, damped))
    turned = [root.inverted() if recipe.weighting == "inverse" else root for root in roots]
    smaller = min(weight.shape)
    randomised = smaller >= _RANDOMISED_FROM and rank <= _RANDOMISED_BELOW * smaller
    return weighted_svd(weight, turned[0], turned[1], rank=rank, randomised=randomised, seed=seed), notes


def _working_dtype(rows: int, columns: int) -> torch.dtype:
    return torch.float64 if max(rows, columns) <= _FLOAT64_UP_TO else torch.float32


def _damping_for(tokens: int, size: int) -> float:
    """What kept most of the held-out second moments in measurements: the fewer tokens, the more."""
    return 0.01 if tokens >= 4 * size else 0.1 if tokens >= size else 1.0


def _matrix(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"


def _write(path: Path, factors: WeightedFactors, notes: Sequence[str]) -> None:
    tensors = {"A": factors.left.float(), "B": factors.right.float(), "values": factors.values.double()}
    record = json.dumps({"energy": factors.energy, "notes": list(notes)})
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    replace_atomically(path, (save(stored, metadata={"record": record}),))


def _seconds(folder: Path) -> float:
    spent = folder / _SECONDS  # not there after a kill between the first layer's file and its line
    return sum(float(line) for line in spent.read_text(encoding="utf-8").split()) if spent.exists() else 0.0


def _is_done(path: Path) -> bool:
    """Whether a layer's factors are there. A damaged file is said, and its layer decomposed again."""
    if not path.exists():
        return False
    try:
        _notes(path)
    except SafetensorError as error:
        logger.warning("%s is damaged (%s); that layer is decomposed again", path, first_line(error))
        return False
    return True


def _notes(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        notes: list[str] = json.loads(file.metadata()["record"])["notes"]
    return notes
