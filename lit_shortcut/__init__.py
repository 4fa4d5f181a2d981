"""Accelerate masked image generation by learned feature transitions (MIGM-Shortcut, arXiv 2602.23996)."""
