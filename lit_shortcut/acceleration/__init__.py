"""What stands in for the base between full steps, and when."""
