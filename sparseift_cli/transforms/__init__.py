"""From a plan to a network: edits of the module, members that replace layers, weights, masks, and the check of the result.

convert          a SOURCE or a checkpoint -> transformed module; uses all of the following
transformation   trace -> plan -> surgery -> weights -> masks -> check, for any module
surgery          a plan -> edits; edits -> a new module
edits            the edits as plain data
layers           a layer like another one with other sizes
members/         the module of each member, and which edits a plan asks for
attention        members inside nn.MultiheadAttention
initialise       fresh weights; the dense weights (preserve)
preserve/        how a transformed network keeps the function of the dense one
masking          masks with the planned numbers of non-zeros
check            measured == planned
compare          the function: the deviation from the dense outputs, and what a configuration would lose
artifact         the folder that `save` writes; reading its JSON needs no torch
restore          from that folder back to a module
"""
