"""A transformed network that starts as the dense one: the same function, with the planned non-zeros (`--init preserve`).

What "the same function" means depends on the member:

- Sparse Wide (`wide`): the dense weights are placed inside the wide ones, and their positions are the mask. Exact with
  BatchNorm, in train and eval mode; with RMSNorm (gain * sqrt(a), eps * a, a = D / D'); with LayerNorm where every
  layer that writes its input can be centred, as in pre-LN transformers (`norms`). Attention scores are kept by scaled
  queries and rotary frequencies (`attention`). Where the dense channels are along each width: `coordinates`.
- Sparse Parallel, Doped, Factorized (`members`, `factors`): the dense weights are split over the branches, or factorized
  by a truncated SVD. Exact for Parallel without norms in its branches; otherwise as near as the planned non-zeros
  allow.
- Scope none, the sparse control of dense size: the largest weights of each layer stay.

A wide network made this way is at a saddle point: added channels have exactly zero gradients, so training would stay in
the dense network. `--preserve-slack q` replaces the smallest share q of the weights by random ones that feed the added
channels (`slack`). The function then differs a little; `deviation` in `transforms.check` measures by how much.

    preserve/
      coordinates   where the dense channels are in every wider width
      norms         which norms are exact, and which weights change for them
      attention     scales of queries, rotary frequencies
      slack         the mask of one wide weight
      wide          Sparse Wide, all of the above together; scope none
      factors       a matrix as a product of two
"""
