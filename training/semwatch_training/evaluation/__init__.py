"""Protocols, the paper's experiments, and their reports."""
