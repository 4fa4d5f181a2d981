"""Arithmetic of decoding, independent of any network."""
