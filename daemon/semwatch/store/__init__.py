"""What is remembered on disk: the ledger, results and their pictures, lot tables, the audit log.

May import: `system`, `defects`, `errors`.
Start reading: `ledger.py`, which alone says what is done.
"""
