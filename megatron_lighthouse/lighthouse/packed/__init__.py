"""Lighthouse over packed documents: every document of a row as if it were alone, all of them at once."""
