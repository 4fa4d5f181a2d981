"""Finished rows to a Markdown table, a Pareto plot, grids of images and a JSON file."""
