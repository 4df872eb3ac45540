"""Ways to make gradients short: each a small class, chosen by name once, at the top."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from tamis.errors import InvalidSettings
from tamis.projection.dense import RademacherProjector
from tamis.projection.factorized import FactorizedProjector
from tamis.projection.hadamard import HadamardProjector
from tamis.projection.mask import MaskProjector
from tamis.projection.none import NoProjector
from tamis.projection.whole import project_gradients

__all__ = [
    "DEFAULT_DIMS",
    "PROJECTIONS",
    "AnyProjector",
    "FactorizedProjector",
    "HadamardProjector",
    "MaskProjector",
    "NoProjector",
    "RademacherProjector",
    "make_projector",
    "project_gradients",
]

AnyProjector = FactorizedProjector | HadamardProjector | MaskProjector | NoProjector | RademacherProjector

PROJECTIONS: Mapping[str, type[AnyProjector]] = MappingProxyType(
    {
        "none": NoProjector,
        "factorized": FactorizedProjector,
        "rademacher": RademacherProjector,
        "hadamard": HadamardProjector,
        "mask": MaskProjector,
    }
)

# Per side of a layer for "factorized", numbers per sample for the others (8,192 is what LESS uses).
DEFAULT_DIMS: Mapping[str, int] = MappingProxyType(
    {"factorized": 16, "rademacher": 8192, "hadamard": 8192, "mask": 8192}
)


def make_projector(name: str, *, dim: int | None = None, seed: int = 0) -> AnyProjector:
    """The projection called ``name``.

    Args:
        name: one of ``PROJECTIONS``.
        dim: for "factorized" the numbers per side of a layer (16 makes 16 x 16 a layer), for the others the numbers
            per sample; None for the default. "none" takes no dim.
        seed: root seed. Equal seeds give equal features in every process, on every device, in every session.

    Raises:
        InvalidSettings: the name is unknown, ``dim`` is not positive, or "none" was given a ``dim``.

    Example:
        >>> make_projector("factorized", dim=16, seed=0).identity
        {'algorithm': 'factorized-v1', 'dim': 16, 'seed': 0}
    """
    if name not in PROJECTIONS:
        raise InvalidSettings(f"projection {name!r} is unknown; choose one of {', '.join(PROJECTIONS)}")
    if name == "none":
        if dim is not None:
            raise InvalidSettings(
                f"projection_dim={dim} has no meaning with projection 'none'; leave it out or choose a projection"
            )
        return NoProjector()
    if dim is None:
        dim = DEFAULT_DIMS[name]
    if dim < 1:
        raise InvalidSettings(f"projection_dim must be at least 1, got {dim}")
    factory: Callable[..., AnyProjector] = PROJECTIONS[name]
    return factory(dim=dim, seed=seed)
