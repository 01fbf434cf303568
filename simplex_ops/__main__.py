"""python -m simplex_ops: what is installed, for bug reports."""

from .info import info

print(info())
