"""Protocols, the paper's experiments, baselines in the same run, tables and pictures.

May import: `publishing`, `families`, `discovery` and below.
Start reading: `evaluate.py`.
"""
