"""Figures of merit on plain arrays, and how sure they are."""
