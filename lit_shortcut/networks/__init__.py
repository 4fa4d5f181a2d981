"""Networks that are independent of any base."""
