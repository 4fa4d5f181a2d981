"""Callbacks: weight averaging, recording, sampling, reports."""
