"""Several processes that share an inner problem, each with its own batch.

:class:`Group` for parameters that are whole in each, :class:`Shards` for parameters in parts.
"""

from .checkpoint import joined, packed, unpacked
from .find import Processes, group_of
from .group import Group

__all__ = ["Group", "Processes", "group_of", "joined", "packed", "unpacked"]
