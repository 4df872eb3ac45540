"""Which releases a result was computed with."""

from __future__ import annotations

import platform
from importlib import metadata

from tamis import __version__

__all__ = ["releases", "versions"]


def releases(*names: str) -> dict[str, str]:
    """Releases of libraries that are installed: with another one, numbers may differ, so identities have them."""
    return {name: metadata.version(name) for name in names}


def versions() -> dict[str, str]:
    """Releases of Python, the platform and the libraries, as far as they are installed."""
    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "safetensors")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "tamis": __version__, **found}
