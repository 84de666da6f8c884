"""Triton kernels: a folder an attention, one file a step; what they share stands beside them."""
