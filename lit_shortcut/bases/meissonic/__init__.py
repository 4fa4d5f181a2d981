"""Meissonic and Monetico."""
