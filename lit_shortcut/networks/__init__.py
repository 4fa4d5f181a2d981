"""Networks that know no base."""
