"""Attention over a sequence that several ranks share: the exchange, and the schemes that Megatron's --cp-comm-type names."""
