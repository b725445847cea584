"""What a transform will do to each layer, and what that costs: exact integers, no torch."""
