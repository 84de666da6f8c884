"""Whether TensorBoard's event files can be trusted: its own reader drops all that follows a damaged record, without a word."""

from __future__ import annotations

import struct
from pathlib import Path

from megatron_lighthouse.notice import say_once

HEADER, FRAME = 12, 16
"""Bytes of a record before its content, a length and its checksum; and around it, with the checksum of the content."""


def check_whole(folder: Path) -> None:
    """Read every event file of a log. One that ends within a record, as a killed process leaves it, is said.

    Raises:
        ValueError: a file that is damaged, or is no event file.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    for path in sorted(folder.glob("*tfevents*")):
        records, size = 0, path.stat().st_size
        read = 0
        for record in RawEventFileLoader(str(path)).Load():
            records, read = records + 1, read + len(record) + FRAME
        if read < size and not _cut_short(path, read, size):
            raise ValueError(
                f"{path} is damaged at byte {read:,} of {size:,}, behind {records:,} records: its checksum is wrong. What "
                "follows cannot be read, and nothing is judged: give an undamaged copy of the log."
            )
        if read < size:
            say_once(f"{path} ends within a record, {size - read} bytes from its end: what follows was never written.")


def _cut_short(path: Path, read: int, size: int) -> bool:
    """Whether a file ends within the record at `read`, whose length is not in doubt."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with path.open("rb") as file:
        file.seek(read)
        header = file.read(HEADER)
    if len(header) < HEADER:
        return True
    length, checksum = struct.unpack("<QI", header)
    return bool(masked_crc32c(header[:8]) == checksum and read + length + FRAME > size)
