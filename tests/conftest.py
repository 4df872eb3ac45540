"""Settings for the whole test run."""

import os

from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes in annotations are promises; while tests run, they are checked at every call.
install_import_hook(
    [
        "tamis.maths",
        "tamis.solve",
        "tamis.model.head",
        "tamis.gradients.layers",
        "tamis.gradients.ghost",
        "tamis.gradients.jvp",
        "tamis.projection",
    ],
    "beartype.beartype",
)

# An example's time says more about what else the machine is doing than about the code.
# In CI the same examples every time, so that a commit is judged by its own change; elsewhere new ones, to learn more.
settings.register_profile("tamis", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tamis")
