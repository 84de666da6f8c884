"""Triton kernels of the steps, one file a step. None yet: the steps run as `megatron_lighthouse.reference`."""
