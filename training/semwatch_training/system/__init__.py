"""Checkpoints that resume, weight files, progress bars.

May import: nothing of the package.
Start reading: `checkpoint.py`.
"""
