"""The arithmetic of a decoder with adapters: tensors in, tensors out, gradients by hand.

One file per operation. Each has its definition beside it (`*_reference`: plain torch, autograd does the rest) and a fast form
that says in its docstring what it keeps for the backward pass and what it computes again. Nothing here knows a model, a method
or a file. Rows are tokens: `x` is `[tokens, features]`, packed without padding.
"""

import os

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
"""oneDNN keeps the code it made for each shape of a product, 1,024 of them by default. With passes of all lengths that grew a run
of a 135M base by 0.7 GB beyond its budget; a training step has fewer than 64 shapes. Read when the first product runs; a user's
own number stays.
"""
