"""Builds the wheel and installs it beside its declared dependencies only, without a network.

The environment is a real virtual environment into whose site-packages the wheel is unpacked and every installed
distribution that the wheel's metadata asks for, directly or not, is linked. What is not declared is not there, so an
undeclared import fails as it would on a user's machine.
"""

from __future__ import annotations

import configparser
import email
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.message import Message
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def canonical(name: str) -> str:
    """A distribution's name as packaging tools compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def build(out: Path) -> tuple[Path, Path]:
    """Paths of the sdist and of the wheel built from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def wheel_metadata(wheel: Path) -> Message:
    """The METADATA file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    return email.message_from_string(text)


def closure(requirements: Iterable[str], extras: Iterable[str] = ()) -> dict[str, metadata.Distribution]:
    """Every distribution that ``requirements`` lead to in this environment, by canonical name.

    Raises:
        AssertionError: one is not installed, or its version is outside the declared range.
    """
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(text), frozenset(extras)) for text in requirements]
    while waiting:
        requirement, active = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in active or {""}):
            continue
        name = canonical(requirement.name)
        distribution = metadata.distribution(name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), (
            f"{requirement} is required but {distribution.version} is installed"
        )
        found[name] = distribution
        wanted = frozenset(requirement.extras) | {""}
        if (name, wanted) not in done:
            done.add((name, wanted))
            waiting += [(Requirement(text), wanted) for text in distribution.requires or []]
    return found


def environment_with(wheel: Path, distributions: Iterable[metadata.Distribution], folder: Path) -> Path:
    """The interpreter of a new environment that holds the wheel and ``distributions`` and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    for distribution in distributions:
        assert distribution.files is not None, f"{distribution.name} has no list of its files"
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(entry_points).decode())
    for name, target in scripts["console_scripts"].items():
        module, function = target.split(":")
        script = folder / "bin" / name
        script.write_text(f"#!{python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        script.chmod(0o755)
    return python
