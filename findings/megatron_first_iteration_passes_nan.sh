#!/usr/bin/env bash
# Expected: --check-for-nan-in-loss-and-grad is on by default, so a loss that is NaN is never stepped; --rerun-mode only adds reruns.
# megatron-core 0.19.2: with the default --rerun-mode validate_results the first iteration of every process is not checked, and the
# optimizer steps on the NaN; with --rerun-mode disabled, the weaker by its name, it raises at once
# (core/rerun_state_machine.py, RerunStateMachine.validate_result, first_iteration_complete). It matters most right after a resume, where
# a new length, mask or attention gives NaN if ever, and where all weights are then NaN, and saved.
# What we do: the first iteration is checked as the others are (mcore/loop/finite.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3.12 python3.13 python3 ~/.pyenv/versions/3.1[2-9]*/bin/python3; do
    "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.14.1 numpy==2.5.5 megatron-core==0.19.2
cd "$folder"
cat >finding.py <<'EOF'
import torch
from megatron.core import __version__
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

print("megatron-core", __version__, "torch", torch.__version__)
torch.cuda.current_device = lambda: 0  # only for the text of the error


class OneProcess(RerunStateMachine):
    """Without a GPU: nothing to reduce over, no state of a GPU's generator to save."""

    def _reduce_any(self, value):
        return tuple(value) if isinstance(value, list) else value

    def _save_state(self):
        pass


def iterations(mode):
    """What becomes of two iterations whose loss is NaN, called as train_step and train call it."""
    machine = OneProcess(mode=mode)
    for _ in range(2):
        assert machine.should_run_forward_backward(None)
        try:
            machine.validate_result(torch.tensor(torch.nan), rejection_func=torch.isnan, message="found NaN in local forward loss")
        except RuntimeError as error:
            assert "Unexpected result nan" in str(error), error
            yield "raised"
            return
        if machine.rerun_requested:
            yield "rejected"
            return
        assert not machine.should_run_forward_backward(None)
        stop = machine.should_checkpoint_and_exit()[1]
        yield "stops" if stop else "optimizer steps"


seen = {mode.value: list(iterations(mode)) for mode in (RerunMode.DISABLED, RerunMode.VALIDATE_RESULTS)}
for mode, outcome in seen.items():
    print(f"loss NaN from the first iteration on, --rerun-mode {mode}:", ", then ".join(outcome))
assert seen == {"disabled": ["raised"], "validate_results": ["optimizer steps", "rejected"]}
EOF
venv/bin/python -W ignore finding.py
