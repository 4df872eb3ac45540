"""Settings for the whole test run."""

from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes in annotations are promises; while tests run, they are checked at every call.
install_import_hook(
    ["tamis.maths", "tamis.gradients.layers", "tamis.gradients.ghost", "tamis.projection"],
    "beartype.beartype",
)

# An example's time says more about what else the machine is doing than about the code.
settings.register_profile("tamis", deadline=None)
settings.load_profile("tamis")
