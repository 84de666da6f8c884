"""Megatron's training loop: the run, its forward step, and what follows it."""
