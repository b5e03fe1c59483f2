"""Redis: records of unknowns and results, their producer and consumer, and what daemon and learning tell each other.

May import: `system`, `defects`, `errors`; alone imports redis.
Start reading: `records.py` for the formats, `unknowns.py` for the keys.
"""
