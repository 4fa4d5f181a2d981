"""Frozen masked image generation models behind one protocol."""
