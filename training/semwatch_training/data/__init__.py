"""Images and their truth: data sets on disk, and what is planted in normal images to train on.

May import: `synthetic`, `system`.
Start reading: `datasets.py`.
"""
