"""Everything that imports Megatron: arguments, checks, core attention, layer specs, data, entry point, CPU stand-in."""
