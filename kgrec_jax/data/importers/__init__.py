"""Data sets in other layouts, turned into a dataset folder."""
