"""The members of the Sparse-IFT family, one file each: sizes, parts, costs and words. No torch."""
