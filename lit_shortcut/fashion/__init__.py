"""The embedded default: everything that knows garments."""
