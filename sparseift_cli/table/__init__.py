"""Facts about a dense model at one input shape: its rows (counted ops) and its widths. Decides nothing, imports no torch.

poly   exact integer polynomials over widths: every size and count is one
table  `LayerTable`, `Layer` (a row) and `Width`, with JSON in and out
shape  the dims of one layer as plain numbers
"""
