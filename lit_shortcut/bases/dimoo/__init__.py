"""Lumina-DiMOO."""
