"""What runs inside Triton; ``model.py`` is copied beside each version and imports nothing of semwatch."""
