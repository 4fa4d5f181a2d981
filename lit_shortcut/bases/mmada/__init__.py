"""MMaDA."""
