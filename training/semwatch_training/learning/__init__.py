"""One cycle of learning: unknowns are claimed, become classes, and are judged before they serve.

May import: `publishing`, `evaluation`, `discovery` and below; of the daemon `classes`, `streams`, `models`, `settings`,
never `store` or `service`.
Start reading: `retrain.py`, which reads like the diagram.
"""
