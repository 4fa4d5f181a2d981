"""What is measured of generated images: rows, how they are drawn, what is kept of them."""
