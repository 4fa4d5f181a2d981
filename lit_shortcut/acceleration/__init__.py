"""Plans of full steps, and predictors for the steps between them."""
