"""The line: an image file's bytes to its review, in straight functions on plain arrays.

May import: `intake`, `store`, `settings`, `models` and below.
Start reading: `pipeline.py`, the only file that knows every stage.
"""
