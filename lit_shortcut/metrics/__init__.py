"""Metrics of features, images and speed: pure functions, and thin torchmetrics around them."""
