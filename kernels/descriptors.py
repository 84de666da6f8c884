"""Where the tensor cores of Hopper read shared memory, as the machine code says: a check of what ptxas made.

A warp-group product takes its operands' places from uniform registers, as descriptors of 64 bits that are made of constants.
The ptxas 12.8 that Triton 3.6 brings makes one of wrong registers in a kernel that has run out of uniform ones: that was seen
on an H200 as an illegal memory access. So the constants are carried through the machine code here. A kernel that passes can
be wrong all the same, as one was: only what lies outside is found.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

State = dict[str, int]
"""What registers and carry flags are known to hold, 32 bits each."""
BASE = 0x400
"""Where a kernel's shared memory begins."""
_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)(?:\s+(.*?))?\s*;")
_MASK = 0xFFFFFFFF


class Operation(NamedTuple):
    """A machine instruction."""

    address: int
    guard: str
    """Its predicate; empty: none."""
    name: str
    operands: list[str]


class Product(NamedTuple):
    """A warp-group product, and the descriptor of an operand; None where it is not a constant."""

    address: int
    descriptor: int | None


def problem(code: str, shared: int) -> str | None:
    """What is wrong with the descriptors of a kernel that has so many bytes of shared memory; None where nothing is.

    `code` is what `disassembled` gives. A descriptor says where an operand begins, and how far its groups of 8 rows lie
    apart: both must lie within.
    """
    for product in products(code):
        if product.descriptor is None:
            continue
        begin, apart = (product.descriptor & 0x3FFF) << 4, (product.descriptor >> 32 & 0x3FFF) << 4
        if not BASE <= begin < BASE + shared or begin + apart >= BASE + shared:
            return (
                f"ptxas has the tensor cores read shared memory at {begin:#x} and {apart:#x} further, of {shared:#x} bytes "
                f"from {BASE:#x}, at {product.address:#x}: another tile, or more warps"
            )
    return None


def disassembled(cubin: bytes, nvdisasm: str) -> str:
    """What nvdisasm, at that path, says of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([nvdisasm, "-c", str(path)], capture_output=True, text=True, check=True).stdout


def products(code: str) -> list[Product]:
    """Those of a kernel, an entry for each operand in shared memory."""
    blocks, follows = _parsed(code)
    entries: dict[int, State] = {0: {}}
    waiting = [0]
    while waiting:
        i = waiting.pop()
        state = dict(entries[i])
        for operation in blocks[i]:
            _step(state, operation)
        for after in follows[i]:
            met = state if after not in entries else {x: n for x, n in entries[after].items() if state.get(x) == n}
            if after not in entries or met != entries[after]:
                entries[after] = dict(met)
                waiting.append(after)
    found: list[Product] = []
    for i, state in sorted(entries.items()):
        state = dict(state)
        for operation in blocks[i]:
            found += _read(state, operation)
            _step(state, operation)
    return found


def _parsed(code: str) -> tuple[list[list[Operation]], list[list[int]]]:
    """Blocks of instructions, and those that may follow each."""
    blocks: list[list[Operation]] = [[]]
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if line.startswith(".L_"):
            blocks.append([])
            labels[line.rstrip(":")] = len(blocks) - 1
        elif match := _LINE.search(line):
            address, guard, name, operands = match.groups()
            blocks[-1].append(Operation(int(address, 16), guard or "", name, re.split(r",\s*", operands or "")))
            if name.split(".")[0] in ("BRA", "EXIT"):
                blocks.append([])
    follows: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = block[-1] if block else None
        jumps = last is not None and last.name.startswith("BRA")
        ends = last is not None and not last.guard and last.name.split(".")[0] in ("BRA", "EXIT")
        target = re.search(r"\.L_\w+", last.operands[-1]) if last is not None and jumps else None
        follows.append([labels[target[0]]] if target else [])
        if not ends and i + 1 < len(blocks):
            follows[-1].append(i + 1)
    return blocks, follows


def _read(state: State, operation: Operation) -> Iterator[Product]:
    if not operation.name.startswith("HGMMA"):
        return
    for operand in operation.operands[1:3]:
        if match := re.match(r"gdesc\[UR(\d+)\]", operand):
            # four registers: of the left operand where it is in shared memory, then of the right one
            first = int(match[1])
            for low in (first, first + 2) if operand is operation.operands[1] else (first + 2,):
                words = state.get(f"UR{low}"), state.get(f"UR{low + 1}")
                known = None not in words
                yield Product(operation.address, (words[0] or 0) | (words[1] or 0) << 32 if known else None)


def _step(state: State, operation: Operation) -> None:
    """Carry what is known past an instruction; what it writes and is not understood is known no more."""
    written = _written(operation)
    results = _results(state, operation) if not operation.guard else {}
    for register in written:
        state.pop(register, None)
    state.update(results)


def _results(state: State, operation: Operation) -> State:
    """Of the instructions that descriptors are made with."""

    def value(operand: str) -> int | None:
        operand = operand.removesuffix(".reuse")
        if operand in ("RZ", "URZ"):
            return 0
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return int(operand, 16) & _MASK
        return state.get(operand)

    name, operands = operation.name, operation.operands
    target = operands[0]
    if match := re.fullmatch(r"(LDL|STL)(?:\.(64|128))?", name):  # the stack, by its place
        place, register = (operands[1], target) if match[1] == "LDL" else (target, operands[1])
        offset = re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", place)
        if offset is None:
            return {}
        words = [f"[{int(offset[1] or '0', 16) + 4 * i}]" for i in range(int(match[2] or 32) // 32)]
        names = [register.removesuffix(".reuse"), *(_next(register, i + 1) for i in range(len(words) - 1))]
        ways = zip(words, names, strict=True) if match[1] == "STL" else zip(names, words, strict=True)
        return _known({to: 0 if origin == "RZ" else state.get(origin) for to, origin in ways})
    if name in ("UMOV", "R2UR", "MOV") and len(operands) == 2:
        return _known({target: value(operands[1])})
    if name in ("IMAD.U32", "IMAD.MOV.U32") and operands[1:3] == ["RZ", "RZ"]:
        return _known({target: value(operands[3])})
    if name == "S2UR" and operands[1] == "SR_CgaCtaId":
        return {target: 0}  # no clusters
    if name in ("UIADD3", "UIADD3.X"):
        carries = [x for x in operands[1:] if re.fullmatch(r"U?P\w", x)]
        given = [value(x) for x in operands[1:] if x not in carries and not x.startswith("!")]
        if name == "UIADD3.X":
            given += [state.get(x) for x in carries[:1]]
        if None in given:
            return {}
        total = sum(x or 0 for x in given)
        return {target: total & _MASK, **({carries[0]: total >> 32} if name == "UIADD3" and carries else {})}
    if name == "UIADD3.64":
        wide = [(value(x), value(_next(x))) for x in operands[1:3]]
        if any(None in pair for pair in wide):
            return {}
        total = sum((low or 0) | (high or 0) << 32 for low, high in wide)
        return {target: total & _MASK, _next(target): total >> 32 & _MASK}
    shifted = value(operands[-1]), value(operands[2]) if len(operands) > 2 else None
    if name == "USHF.R.U32.HI" and operands[1] == "URZ" and None not in shifted:
        return {target: (shifted[0] or 0) >> (shifted[1] or 0)}
    if name == "USGXT.U32" and len(operands) == 3:
        given = [value(x) for x in operands[1:]]
        return {} if None in given else {target: (given[0] or 0) & (1 << (given[1] or 0)) - 1}
    if name == "ULEA" and len(operands) == 4:
        given = [value(x) for x in operands[1:]]
        return {} if None in given else {target: (((given[0] or 0) << (given[2] or 0)) + (given[1] or 0)) & _MASK}
    return {}


def _written(operation: Operation) -> list[str]:
    """The registers that an instruction writes, or more: flags, and as many registers as its kind writes at most."""
    name = operation.name
    flags = [x for x in operation.operands[:3] if re.fullmatch(r"U?P\d", x)]
    target = re.fullmatch(r"(U?R)(\d+)(?:\.\w+)*", operation.operands[0])
    if match := re.match(r"STL.*\[R1(?:\+(0x[0-9a-f]+))?\]", f"{name} {operation.operands[0]}"):
        return [f"[{int(match[1] or '0', 16) + 4 * i}]" for i in range(4 if "128" in name else 2 if "64" in name else 1)]
    if target is None or name.split(".")[0] in ("STG", "STS", "STL", "STSM", "BAR", "RED", "ATOM"):
        return flags
    count = 1
    if match := re.match(r"HGMMA\.64x(\d+)", name):
        count = int(match[1]) // 2
    elif ".128" in name or "88.4" in name:
        count = 4
    elif ".64" in name or "WIDE" in name or name.startswith(("CS2R", "DADD", "DFMA", "DMUL", "F2F.F64")):
        count = 2
    elif name.startswith(("HMMA", "IMMA")):
        count = 4
    return [*flags, *(f"{target[1]}{int(target[2]) + i}" for i in range(count))]


def _next(register: str, count: int = 1) -> str:
    match = re.match(r"(U?R)(\d+)", register)
    return f"{match[1]}{int(match[2]) + count}" if match else "URZ"


def _known(results: dict[str, int | None]) -> State:
    return {x: n for x, n in results.items() if n is not None}


def used(cubin: bytes, cuobjdump: str) -> tuple[int, int]:
    """Registers, and bytes of the stack, on which nothing lies but what is spilled, as the machine code says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])
