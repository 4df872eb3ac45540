"""Settings for the whole test run."""

from hypothesis import settings

# An example's time says more about what else the machine is doing than about the code.
settings.register_profile("tamis", deadline=None)
settings.load_profile("tamis")
