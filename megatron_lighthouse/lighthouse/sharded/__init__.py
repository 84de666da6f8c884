"""Lighthouse where context-parallel ranks share the sequence: its selection, its rows, its halo, and what it sends."""
