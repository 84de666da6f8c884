"""Everything that imports Megatron: attention, command line, training loop, data."""
