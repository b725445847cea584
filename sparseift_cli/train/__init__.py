"""Training by a recipe: prepare, the loop, evaluation, the FLOPs that were spent. `loop.py` is the place to start reading."""
