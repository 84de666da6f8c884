"""A variant in one folder and one line: softmax attention with a fixed temperature per head, and a stream of further logits."""
