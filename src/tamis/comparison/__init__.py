"""Contenders against each other: which rows each trains on, every run once, measured alike, and what may be concluded.

``tamis.compare`` is the verb; it lives in ``tamis.api``.
"""
