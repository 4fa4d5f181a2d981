"""Longer measurements than tests, a command each: data path, ablations, frontier, GPU, forecast."""
