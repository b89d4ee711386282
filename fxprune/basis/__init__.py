"""Change of basis: families that only linear maps, sums and norms touch are rotated before they are cut."""
