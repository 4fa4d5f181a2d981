"""Halton-MaskGIT."""
