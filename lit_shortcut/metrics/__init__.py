"""Pure measures and the thin states around them."""
