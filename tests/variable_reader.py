"""Another reading of the variable-tracking probe's texts: their assignments are carried out one by one."""

from __future__ import annotations

import re

QUESTION = re.compile(r"\nWhat is VAR ([A-Z])\? VAR \1 = (\d?)$")


def assignments(said: str) -> list[tuple[str, str]]:
    """Names and what they are given, a digit or a name, in their order."""
    return re.findall(r"\nVAR ([A-Z]) = (?:VAR )?(\d|[A-Z])(?=\n)", said)


def question(said: str) -> tuple[str, str]:
    """The text's end, and the name that it asks for."""
    found = QUESTION.search(said)
    assert found, said[-80:]
    return found[0], found[1]


def read(said: str) -> tuple[int, int]:
    """Of a text and an answer: the digit that its name has, and the hops to it. Nothing is used before it is given."""
    found, hops = dict[str, int](), dict[str, int]()
    for name, value in assignments(said):
        assert name not in found
        found[name], hops[name] = (int(value), 0) if value.isdigit() else (found[value], hops[value] + 1)
    _, asked = question(said)
    return found[asked], hops[asked]
