"""Softmax attention: stock backends, a part of it with its log-sum-exp, and the merge of two parts."""
