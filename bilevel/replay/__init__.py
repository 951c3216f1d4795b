"""Visit the steps of a long computation backward within a bound on memory: checkpoint schedules, stores, the sweep."""

from bilevel.replay.schedules import Action, Advance, Binomial, Drop, KAry, Reverse, Schedule, Sqrt, StoreAll
from bilevel.replay.stores import Disk, Host, Memory, Shelf, Store
from bilevel.replay.sweep import Process, Visited, reverse

__all__ = [
    "Action",
    "Advance",
    "Binomial",
    "Disk",
    "Drop",
    "Host",
    "KAry",
    "Memory",
    "Process",
    "Reverse",
    "Schedule",
    "Shelf",
    "Sqrt",
    "Store",
    "StoreAll",
    "Visited",
    "reverse",
]
