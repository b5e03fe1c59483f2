"""Frozen trunks: networks that others trained, and how their weights are fetched and checked.

May import: `system`.
Start reading: `backbone.py`.
"""
