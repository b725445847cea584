"""The mask update as a few GPU kernels, which a CUDA graph can hold."""
