"""Classes that were found among unknowns: clusters, people's decisions, observations by cycles.

May import: `streams`, `settings`, `models` and below.
Start reading: `clusters.py`.
"""
