"""Two small matrices per layer, one on each side of its gradient: features without ever forming the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tamis.seeds import child_seed, random_signs
from tamis.types import LayerSpec

__all__ = ["FactorizedProjector"]

Side = Literal["out", "in"]

_ALGORITHM = "factorized-v1"

_WHOLE_RANK = 64  # the rank side of an adapter's factors stays whole up to here


class FactorizedProjector:
    """``grad -> P_out^T grad P_in`` per layer, ``(O, I) -> (k_out, k_in)``, entries ±1/√k; all layers side by side.

    With ``grad = grad_out^T act`` the feature is ``(grad_out P_out)^T (act P_in)``, so that only the projected factors
    are ever multiplied. All cross-position terms survive, and inner products are unbiased whatever the length of the
    text; their variance is larger than that of a dense projection of the same size. ``projection/distortion.py``
    measures it.

    A side of at most ``dim`` features is left whole: projecting it would only lose. So is the rank side of a LoRA
    factor (``lora_A``, ``lora_B``) up to rank 64, whatever ``dim``: a rank-32 adapter cut to 16 would lose half of
    the little it has. Only its long side is projected.

    Args:
        dim: numbers per side, so that a layer has ``dim * dim`` of them at most.
        seed: root seed; the matrices depend on it, on the layer's name and on its shape, and on nothing else.
    """

    def __init__(self, *, dim: int, seed: int) -> None:
        self.dim = dim
        self.seed = seed
        self._sides: dict[tuple[str, int, int, torch.device, torch.dtype], tuple[Tensor | None, Tensor | None]] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the space."""
        return {"algorithm": _ALGORITHM, "dim": self.dim, "seed": self.seed}

    def layer_shape(self, layer: LayerSpec) -> tuple[int, int]:
        """``(k_out, k_in)``: the shape of one layer's feature."""
        rows, columns = layer.shape
        return (
            rows if self._is_whole(layer, "out") else self.dim,
            columns if self._is_whole(layer, "in") else self.dim,
        )

    def output_dim(self, layers: Sequence[LayerSpec]) -> int:
        """Numbers per sample: ``k_out * k_in`` of every layer, in the order of ``layers``."""
        return sum(k_out * k_in for k_out, k_in in map(self.layer_shape, layers))

    def sides(
        self, layer: LayerSpec, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "O K_out"] | None, Float[Tensor, "I K_in"] | None]:
        """``(P_out, P_in)`` of a layer, made once per device and dtype; None stands for the identity.

        ``P_in`` has a last row for the bias column if the layer has one. In float32 they are exact for ``dim``
        4, 16, 64 and so on; in half precision other sizes round 1/√dim, one common factor that no comparison within
        a store sees.
        """
        rows, columns = layer.shape
        key = (layer.name, rows, columns, torch.device(device), dtype)
        if key not in self._sides:
            self._sides[key] = (
                self._side(layer, "out", torch.device(device), dtype),
                self._side(layer, "in", torch.device(device), dtype),
            )
        return self._sides[key]

    def project_gradient(self, layer: LayerSpec, grads: Float[Tensor, "B O I"]) -> Float[Tensor, "B K"]:
        """The feature of gradients that exist already, such as a mean target gradient; ``grads`` is ``(B, O, I)``.

        Equal to what the factors give, up to rounding, since the projection is linear.
        """
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        p_out, p_in = self.sides(layer, grads.device, dtype)
        feature = grads.to(dtype)
        if p_in is not None:
            feature = feature @ p_in  # (B, O, k_in)
        if p_out is not None:
            feature = p_out.T @ feature  # (B, k_out, k_in)
        return feature.flatten(1)

    def _is_whole(self, layer: LayerSpec, side: Side) -> bool:
        size = layer.shape[0 if side == "out" else 1]
        rank_side: Side | None = "out" if "lora_A" in layer.name else "in" if "lora_B" in layer.name else None
        return size <= (max(self.dim, _WHOLE_RANK) if side == rank_side else self.dim)

    def _side(self, layer: LayerSpec, side: Side, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        if self._is_whole(layer, side):
            return None
        size = layer.shape[0 if side == "out" else 1]
        seed = child_seed(self.seed, _ALGORITHM, layer.name, side)
        signs = torch.from_numpy(random_signs(seed, size * self.dim)).view(size, self.dim)
        matrix: Tensor = signs.to(torch.float64) / self.dim**0.5
        return matrix.to(device=device, dtype=dtype)
