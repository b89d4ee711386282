"""One specification per op: labels, rewrite, masked form, products, multiply-accumulates."""
