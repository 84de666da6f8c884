"""Checkpoints from Hugging Face to Megatron's `torch_dist` and back, tensor by tensor: no model, no GPU."""
