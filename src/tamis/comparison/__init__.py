"""Contenders against each other: who they are, what a run costs, records of finished runs, and what may be concluded.

Nothing here selects or trains; that is ``tamis.runs.compare`` and the files beside it. ``tamis.compare`` is the verb.
"""
