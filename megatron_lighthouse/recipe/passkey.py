"""The one-digit passkey probe: one sentence in a long text names a digit, which the model must give at the end.

    …filler… \\nThe pass key is 7. Remember it.\\n …filler… \\nWhat is the pass key? The pass key is _

Imports no Megatron.
Ours, after the passkey retrieval of Mohtashami and Jaggi (arXiv 2305.16300).
"""

from __future__ import annotations

import numpy

from megatron_lighthouse.recipe import probe

KEY = "\nThe pass key is {digit}. Remember it.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
SHORTEST = 128
"""Tokens; the key and the question take 74 bytes."""


class Words(probe.Words):
    """The key of each digit, and the question."""

    def __init__(self, encode: probe.Encode) -> None:
        super().__init__(encode)
        self.keys = [encode(KEY.format(digit=digit)) for digit in range(10)]
        self.question = probe.question_of(encode, QUESTION, PROBE.name)

    def tell(self, sample: probe.Sample, _: numpy.random.Generator) -> probe.Told:
        return probe.Told([self.keys[sample.digit]], [sample.at], self.question)

    def shortest(self, _: float) -> int:
        return max(SHORTEST, 1 + max(map(len, self.keys)) + len(self.question.tokens))


PROBE = probe.Probe(
    name="passkey",
    title="passkey",
    axis=probe.Axis("depth", "depths", "depth of the key", ".0%", (0, 0.25, 0.5, 0.75, 1), 1, float, "0 is first"),
    words=Words,
    samples=20,
)
