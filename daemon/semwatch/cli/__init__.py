"""Words for a terminal: arguments in, tables or JSON out; no rule of the product stands here.

May import: everything below `cli`; never `web`.
Start reading: `app.py`, which hangs every command into the tree.
"""
