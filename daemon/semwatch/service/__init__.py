"""The daemon: its loop, one file from bytes to ledger, delivery, re-review, drift, metrics.

May import: `demo`, `line` and below.
Start reading: `loop.py`, whose `run` is the daemon's life.
"""
