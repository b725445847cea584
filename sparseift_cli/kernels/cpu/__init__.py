"""Linear layers of stored r x c cells on a CPU: kernels in C++, compiled on first use, as operators of torch.

`library` compiles and loads kernels.cpp, `ops` has the operators. A cell may be 1 x 1: an unstructured mask.
"""
