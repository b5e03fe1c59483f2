"""Figures of merit on plain arrays, and how sure they are.

May import: nothing of the package.
Start reading: `class_metrics.py`.
"""
