"""Data as Megatron reads it."""
