"""The variable-tracking probe: sentences in a long text assign digits to variables, and these to others; what is one of them?

    …filler… \\nVAR Q = 7\\n …filler… \\nVAR M = VAR Q\\n …filler… \\nWhat is VAR M? VAR M = _

That is one hop. Each text has CHAINS such chains of equal length, in each of which all variables have one digit, another than
in the others: who finds the digits and follows no names is right once in CHAINS. Without a hop it is retrieval by a name.
Imports no Megatron.
Ours in form, after the variable tracking of RULER (Hsieh et al., arXiv 2404.06654), which asks for all names of a value.
"""

from __future__ import annotations

from itertools import pairwise, permutations
from string import ascii_uppercase

import numpy

from megatron_lighthouse.recipe import probe

DIGIT = "\nVAR {name} = {digit}\n"
COPY = "\nVAR {name} = VAR {other}\n"
QUESTION = "\nWhat is VAR {name}? VAR {name} = "
NAMES = ascii_uppercase
CHAINS = 4


class Words(probe.Words):
    """All assignments, and the question for each name."""

    def __init__(self, encode: probe.Encode) -> None:
        super().__init__(encode)
        self.digits = {(name, n): encode(DIGIT.format(name=name, digit=n)) for name in NAMES for n in range(10)}
        self.copies = {pair: encode(COPY.format(name=pair[0], other=pair[1])) for pair in permutations(NAMES, 2)}
        self.questions = {name: probe.question_of(encode, QUESTION.format(name=name), PROBE.name) for name in NAMES}

    def tell(self, sample: probe.Sample, generator: numpy.random.Generator) -> probe.Told:
        """The first chain is asked for, by its last name. Sentences stand anywhere, but a chain's in its order."""
        links = int(sample.at) + 1
        names = [NAMES[i] for i in generator.permutation(len(NAMES))[: CHAINS * links]]
        others = generator.permutation([digit for digit in range(10) if digit != sample.digit])
        chains = []
        for number, digit in enumerate([sample.digit, *others[: CHAINS - 1].tolist()]):
            own = names[number * links : (number + 1) * links]
            chains.append([self.digits[own[0], digit], *(self.copies[name, other] for other, name in pairwise(own))])
        order = generator.permutation(numpy.repeat(range(CHAINS), links)).tolist()
        rest = [iter(chain) for chain in chains]
        sentences = [next(rest[number]) for number in order]
        return probe.Told(sentences, numpy.sort(generator.random(len(sentences))).tolist(), self.questions[names[links - 1]])

    def shortest(self, at: float) -> int:
        digit, copy, question = (
            max(map(len, found))
            for found in (self.digits.values(), self.copies.values(), [one.tokens for one in self.questions.values()])
        )
        return 1 + CHAINS * (digit + int(at) * copy) + question


PROBE = probe.Probe(
    name="variables",
    title="variable tracking",
    axis=probe.Axis("hops", "hops", "hops", ".0f", (0, 1, 2), len(NAMES) // CHAINS - 1, int, "names to follow to the digit"),
    words=Words,
    samples=0,
)
