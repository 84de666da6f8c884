"""Parallax (arXiv 2605.29157): softmax attention less the covariance of its values with a second projection of the input."""
