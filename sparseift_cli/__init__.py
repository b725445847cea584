"""Sparse Iso-FLOP Transformations for PyTorch: transform, audit to the MAC, train, report."""

__version__ = "0.1.0"
