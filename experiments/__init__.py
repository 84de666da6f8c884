"""Trains small models with Lighthouse and dense, and compares them: `python -m experiments`."""
