"""The arithmetic of a decoder with adapters: tensors in, tensors out, gradients by hand.

One file per operation. Each has its definition beside it (`*_reference`: plain torch, autograd does the rest) and a fast form
that says in its docstring what it keeps for the backward pass and what it computes again. Nothing here knows a model, a method
or a file. Rows are tokens: `x` is `[tokens, features]`, packed without padding.
"""
