#!/usr/bin/env bash
# Expected: causal attention over all earlier tokens can be asked for by causal=True and window_size=(-1, 0), as FlashAttention 2 and 3
# document it, and as flash-attn-4 took it up to 4.0.0b29.
# flash-attn-4 4.0.0b36 (from b30 on, flash_attn/cute/interface.py, _resolve_causal_local_window): that is a window of keys from i + 1 to i
# for query i, so none. On an H200 a model trains with attention that returns nothing, without an error. Transformer Engine 2.20.2 asks for
# causal attention in these words (pytorch/attention/dot_product_attention/utils.py, check_set_window_size, and backends.py), so that
# NVTE_FLASH_ATTN=1 NVTE_FUSED_ATTN=0 is enough: a 530M model's step of 32,768 tokens took 0.16 s for 0.54, and its first loss was 6.07 for
# 5.80.
# What we do: a negative side is given as None (mcore/attention/te_flash.py), and said once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.12 python3.13 python3 ~/.pyenv/versions/3.1[2-9]*/bin/python3; do
    "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder/venv"
for release in 4.0.0b29 4.0.0b36; do # without what they need of a GPU: the function that decides is plain Python
    "$folder/venv/bin/pip" install --quiet --no-compile --no-deps --target "$folder/$release" "flash-attn-4==$release"
done
cd "$folder"
cat >finding.py <<'EOT'
import ast
from pathlib import Path

NAME = "_resolve_causal_local_window"


def resolve(release):
    """The function that says, forward and backward, whether attention is causal or local, of an installed release."""
    tree = ast.parse(Path(release, "flash_attn/cute/interface.py").read_text())
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == NAME]
    scope = {}
    exec(compile(ast.Module([function], []), release, "exec"), scope)
    return scope[NAME]


for release, local in (("4.0.0b29", False), ("4.0.0b36", True)):
    causal, is_local, left, right = resolve(release)(True, -1, 0)
    print(f"flash-attn-4 {release}, causal=True, window_size=(-1, 0): causal {causal}, local {is_local}, left {left}, right {right}")
    assert (causal, is_local) == (not local, local)
    assert not local or (left, right) == (-1, 0)
    assert resolve(release)(True, None, None) == (True, False, None, None)
EOT
venv/bin/python finding.py
