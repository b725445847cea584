"""Facts about the dense model: one row a counted operation, and the widths that are tied together. No torch."""
