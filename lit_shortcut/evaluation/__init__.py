"""Evaluation of generated images: rows, their generation, metrics and stored results."""
