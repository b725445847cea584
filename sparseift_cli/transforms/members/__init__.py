"""The modules that stand in for a layer under Sparse Parallel, Factorized and Doped."""
