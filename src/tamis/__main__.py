"""``python -m tamis``: the command line, also for launchers that start modules (``torchrun -m tamis``)."""

from tamis.cli.main import main

main()
