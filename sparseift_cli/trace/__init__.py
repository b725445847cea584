"""Trace any PyTorch model without running its arithmetic: what it costs, and which of its sizes must change together.

`build.trace(model, inputs, name=..., input_shape=...)` runs one forward pass of the unmodified model with symbolic
sizes and returns a `LayerTable` (rows with MACs and parameters, and the model's *widths*) and a `Structure` (where each
width is in the module). A width is a group of dims that the forward pass forces to be equal: the output of a layer and
the input of the next one, all dims that meet in a residual addition, a BatchNorm's weight and the convolution in front
of it. To widen a model is to give widths new sizes. The pipeline, in the order in which it runs:

    build        entry point; symbolic sizes first, plain sizes where a model does not allow them
    symbolise    puts a fake tensor (a shape, no memory) in place of every parameter, and a symbolic int in place of
                 every parameter dim and int attribute (`num_heads`); runs the forward pass; restores the model
      hooks      leaves out a user's forward hooks that only watch
      fake_mode  PyTorch's FakeTensorMode, as this trace needs it
      symint     the symbolic int: a polynomial over width variables, and its value in this run. Asked "is v5 == v9?" by
                 PyTorch, it answers by the values of this run and records the fact
    While the forward pass runs, two modes intercept it and write to one `Recorder`:
      shape_rules  sees functions (F.linear, F.layer_norm): own shape functions for the common layers
      record       sees primitive ops (aten.mm): counts the MACs of each as a polynomial
        ops        which primitive ops cost no MACs, which are views, which are linear
        gradients  which products a backward pass computes, and which forward ones again
        flow       what each tensor is the sum of, for `--init preserve`
        constants  which buffers and plain tensors may grow, by what is done with them; `sinusoids` computes tables of positions
        scales     which numbers multiply which tensors, for attention scales that follow the head dim
        layouts    how a dim is made of others (3 * heads * head_dim), from views, slices and concatenations
    union_find   merges variables that were found equal; what is left over are equations between widths
    kinds        what each width counts: channels, heads, entries of a head, or anything else
    outputs      what the model returns: results, which keep their shapes, and by-products; which layers make the results
    rows         recorded ops -> rows of the LayerTable: names, roles, parameters
    structure    the second result: each symbolic size of the module as a polynomial over widths

`verify` makes the same count by FlopCounterMode and fvcore, for `flops --verify`.

An example with its numbers: 32 samples of 8 features through two linear layers cost 32 * 8 * 16 + 32 * 16 * 4 MACs.

>>> import torch
>>> from torch import nn
>>> from sparseift_cli.trace.build import trace
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
>>> traced = trace(model, (torch.empty(32, 8),), name="mlp", input_shape=(32, 8))
>>> for layer in traced.table.layers:
...     print(layer.name, layer.role, layer.macs, "=", layer.macs.evaluate(traced.table.sizes))
0 input 32*w0*w1 = 4096
2 output 32*w0*w2 = 2048
>>> for number, width in enumerate(traced.table.widths):
...     print(f"w{number}", width.name, width.size, width.fixed)
w0 0.weight[0] 16 None
w1 0.weight[1] 8 None
w2 2.weight[0] 4 output of the model
>>> traced.table.equations  # each is 0: the width that reads the input has the size of the input
(-8 + w1,)
>>> traced.structure.shapes["2.weight"]  # [out, in]: the input of layer 2 is the output of layer 0
(w2, w0)
"""
