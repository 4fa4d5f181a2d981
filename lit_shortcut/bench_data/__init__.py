"""What the path of the data costs, measured side by side."""
