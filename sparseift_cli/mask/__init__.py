"""Which weights are zero: mask patterns, masks with exact counts, and saliency at initialisation."""
