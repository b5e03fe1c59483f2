"""Frozen trunks: the networks that others trained, and how their weights are fetched."""
