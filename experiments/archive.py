"""What all tables of an experiment are made from, in one file: work.tgz. Imports no Megatron. Ours."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments import tables, work
from experiments.runs import EXPERIMENTS
from experiments.tables import Results, replacing
from megatron_lighthouse.recipe.printed_log import LINE

NAME = "work.tgz"
PACKED = (
    "run.json",
    "train.log",
    *(f"{folder}/*.{kind}" for folder in ("evaluation", "hindsight") for kind in ("csv", "json")),
)
"""What is kept of each run, of the log its iterations alone; and its TensorBoard log, where telemetry is read from it."""


def read(path: Path) -> Results:
    """The results in a folder of tables, in a --work folder, in a `NAME`, or in a folder that holds no more than that.

    Raises:
        ValueError: a path without results.
    """
    if path.is_file():
        with TemporaryDirectory() as folder:
            try:
                with tarfile.open(path) as packed:
                    packed.extractall(folder, filter="data")
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(f"{path} is no whole {NAME} ({error}): give one that python -m experiments left.") from None
            return read(Path(folder))
    if (path / tables.FACTS).exists():
        return tables.read(path)
    if any(path.glob("*/run.json")):
        return work.from_work(path)
    if (path / NAME).is_file():
        return read(path / NAME)
    raise ValueError(
        f"{path} has no {tables.FACTS}, no RUN/run.json and no {NAME}: give a folder that python -m experiments "
        f"was given as --out or --work, or a {NAME}."
    )


def pack(folder: Path, path: Path) -> None:
    """Keep in `path`, a .tgz, what all tables are made from, without checkpoints: `read` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(replacing(path), "w:gz") as archive:
        logged = {name for one in EXPERIMENTS.values() for name, run in one.runs.items() if run.telemetry}
        logs = [f"{name}/tensorboard/*" for name in sorted(logged)]
        for pattern in ["corpus.json", *(f"*/{kept}" for kept in PACKED), *logs]:
            for file in sorted(folder.glob(pattern)):
                if file.suffix == ".log":
                    lines = file.read_text(errors="replace").splitlines(keepends=True)
                    content = "".join(line for line in lines if line == work.STARTED or LINE.search(line)).encode()
                else:
                    content = file.read_bytes()
                member = tarfile.TarInfo(str(file.relative_to(folder)))
                member.size, member.mtime = len(content), file.stat().st_mtime
                archive.addfile(member, io.BytesIO(content))
    os.replace(replacing(path), path)
