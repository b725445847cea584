"""Training by a recipe: prepare, the loop, evaluation, and the FLOPs of every step. Start reading at `loop.py`."""
