"""Lighthouse Attention (arXiv 2605.06554): pool, score, select, gather, attend, scatter. Imports no Megatron."""
