"""Golden vectors of an H100: the cases, the program that records them, and the record.

Importing it fills `catalogue.CASES`.
"""

from . import catalogue, elementwise, matrices, memory, sparse, threads

__all__ = ["catalogue", "elementwise", "matrices", "memory", "sparse", "threads"]
