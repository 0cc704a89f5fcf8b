"""Error rates, and what is wrong in them."""
