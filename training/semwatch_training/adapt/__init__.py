"""From a user's normal and labelled images to models that serve: one straight run, judged before it is published.

May import: everything below `__main__`.
Start reading: `adapting.py`.
"""
