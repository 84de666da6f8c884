"""How a sequence's tokens are laid out: integers alone."""
