"""Optimisers and schedules of the learning rate: each is a dataclass of its options that knows how to build what it describes."""
