"""Rules that join several settings: one function per rule, one file per topic; ``check.py`` runs them all.

A rule is a function ``(config, world_size) -> Iterator[Problem]``; ``world_size`` is None if it is not
known.
"""
