"""Reports of finished rows: a Markdown table, a Pareto plot, grids of images, a JSON file and a page."""
