"""Classes that were found among unknowns: clusters, what people decided about them, what cycles saw of them.

May import: `streams`, `settings`, `models` and below.
Start reading: `clusters.py`.
"""
