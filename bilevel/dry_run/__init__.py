"""The door: what can be wrong with a problem, answered before the first step."""

from bilevel.dry_run.door import open_oracles

__all__ = ["open_oracles"]
