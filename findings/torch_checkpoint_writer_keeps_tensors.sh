#!/usr/bin/env bash
# Expected: torch.distributed.checkpoint's FileSystemWriter, which asks its planner for one tensor after the other, holds one at a time:
# resolve_data exists so that a tensor can be made or read when it is to be written, and _SerialCpuLoader yields them singly.
# torch 2.14.1: _write_files_from_queue (distributed/checkpoint/filesystem.py) puts every tensor into tensor_dict by its name until the
# file is finished, though only SerializationFormat.SAFETENSORS reads that dictionary. With the default format and one file a rank, a
# state dict that is made lazily is whole in memory at the end.
# What we do: the converter writes many files, of 256 MiB each (convert/torch_dist.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.12 python3.13 python3 ~/.pyenv/versions/3.1[2-9]*/bin/python3; do
    "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.14.1 numpy==2.5.5
cd "$folder"
cat >finding.py <<'EOF'
import weakref

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

COUNT, SIZE = 16, torch.Size([1000])
made, alive = [], []


class Lazy:
    """What write_data asks of a planner."""

    def resolve_data(self, item):
        alive.append(sum(tensor() is not None for tensor in made))
        tensor = torch.ones(SIZE)
        made.append(weakref.ref(tensor.untyped_storage()))
        return tensor


def item(name):
    data = TensorWriteData(ChunkStorageMetadata(torch.Size([0]), SIZE), TensorProperties(torch.float32), SIZE)
    return WriteItem(MetadataIndex(name, [0]), WriteItemType.SHARD, tensor_data=data)


def write(files):
    """How many earlier tensors are alive when each is asked for."""
    made.clear()
    alive.clear()
    writer = FileSystemWriter(f"checkpoint{len(files)}", per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    writer.prepare_local_plan(SavePlan([]))
    for plan in writer.prepare_global_plan([SavePlan([item(name) for name in names]) for names in files]):
        writer.write_data(plan, Lazy()).wait()
    return list(alive)


names = [f"layer{n}" for n in range(COUNT)]
one, many = write([names]), write([[name] for name in names])
print("torch", torch.__version__)
print("one file: ", one)
print("many files:", many)
assert one[-1] >= COUNT - 2, "the writer lets go of tensors now"
assert max(many) <= 2, many
EOF
venv/bin/python -W ignore finding.py
