#!/usr/bin/env bash
# experiments/on_two_gpus.sh recipe|variants --work FOLDER --out FOLDER …: all runs of an experiment, on two GPUs.
# A recipe and its dense run take turns on one GPU, so that their times compare; five or six variants share one.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
trap 'kill $(jobs -p) 2>/dev/null; exit 143' TERM INT

experiment=${1:-}
shift || true
one=("${PYTHON:-python3}" -m experiments --experiment "$experiment" "$@")
last=
case $experiment in
recipe) first="norm-60 dense" second="norm-60-2 dense-2" ;;
variants)
	one+=(--at-once 6)
	first="norm-60 norm-75 summary-60 half-budget dense"
	second="norm-60-again dilated-60 double-budget three-levels no-pin layers"
	last=cp-2
	;;
*)
	echo "usage: $0 recipe|variants [--work FOLDER] [--out FOLDER] [arguments of python -m experiments]" >&2
	exit 2
	;;
esac
gpus=$("${PYTHON:-python3}" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || {
	echo "$0 needs a Python with torch, and ${PYTHON:-python3} is none: name another by PYTHON=…, such as .venv/bin/python." >&2
	exit 2
}
if ((gpus < 2)); then
	echo "$0 takes two GPUs, and $gpus can be seen: give python -m experiments --experiment $experiment one run after the other." >&2
	exit 2
fi

IFS=' ' read -ra runs <<<"$first"
CUDA_VISIBLE_DEVICES=0 "${one[@]}" --runs "${runs[@]}" &
on_first=$!
IFS=' ' read -ra runs <<<"$second"
CUDA_VISIBLE_DEVICES=1 "${one[@]}" --runs "${runs[@]}" &
on_second=$!
status=0
wait "$on_first" || status=1
wait "$on_second" || status=1
[[ -z $last ]] || CUDA_VISIBLE_DEVICES=0,1 "${one[@]}" --runs "$last" || status=1
exit "$status"
