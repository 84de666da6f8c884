"""What the inner attention can be called. A file of its own, for `backends` imports torch, which a command line need not."""

INNER = ("auto", "te", "fa4", "fa3", "cudnn", "fa2", "sdpa")
"""Those of `backends.BACKENDS`, and before them 'auto' and 'te' (Transformer Engine's, in its own layer spec)."""
