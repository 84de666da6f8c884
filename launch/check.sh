# shellcheck shell=bash
# Sourced by the scripts that queue jobs, and local.sh: what is asked before anything is queued or started.

UNREACHABLE=75 # the status where Slurm does not answer: EX_TEMPFAIL, as another try may help

# check ARGUMENTS, or the points of STUDY, on NODES x GPUS_PER_NODE by PYTHON; "$@" are more options of the check. Of what is not known
# nothing is said: the cluster file is wrong then
check_arguments() {
    local found
    [[ $CHECK != quick ]] || set -- "$@" --without-megatron
    [[ -z $NOWHERE ]] || set -- "$@" --without-files
    for found in "${WRONG[@]}"; do set -- "$@" "--wrong=$found"; done
    set -- --arch "${ARCH:-unknown}" --device "$(device)" ${NODES:+--nodes "$NODES"} ${GPUS_PER_NODE:+--gpus-per-node "$GPUS_PER_NODE"} "$@"
    (
        architecture_environment # Megatron's rules read it
        if [[ -n ${STUDY:-} ]]; then
            check_study "$@"
        else
            "$PYTHON" -m megatron_lighthouse.launch.check "$@" -- "${ARGUMENTS[@]}"
        fi
    )
}

# the same where a job is queued; --point … are several runs that add words to ARGUMENTS
# shellcheck disable=SC2120 # two_stage.sh gives some
check_here() {
    local PYTHON=$PYTHON sees options=() # a container's Python is not here
    [[ -z $IMAGE || ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
    [[ -n $IMAGE || -n $CHECK_PYTHON || -n $NOWHERE ]] || options=(--runs-here)
    PYTHON=${CHECK_PYTHON:-$PYTHON} sees=$(container_folders)
    "$PYTHON" -c 'import importlib.util as found, sys; sys.exit(sys.version_info < (3, 12) or not found.find_spec("numpy"))' 2>/dev/null ||
        die "The check needs a Python of 3.12 or newer with numpy, and $PYTHON is none here. Nothing was queued: make one in" \
            "$ROOT/.venv, name another by CHECK_PYTHON, or give --check 0, and layout and data are not checked."
    check_arguments "$@" "${options[@]}" --sees "$sees"
}

# ask Slurm whether it would take a job: "$@" are the flags of sbatch, and the job
ask_slurm() {
    local said status=0
    command -v sbatch >/dev/null ||
        die "There is no sbatch here. Nothing was queued: run this where Slurm is, or use launch/local.sh without it."
    { said=$(sbatch --test-only "$@" 2>&1 >&3); } 3>&2 || status=$?
    [[ -z $said ]] || printf '%s\n' "$said" >&2
    ((status)) || return 0
    if [[ ${said,,} =~ (unable to contact slurm controller|socket timed out|connection refused|zero bytes were transmitted|slurmctld.*not responding|(unable to|could not) establish a? ?(config|controller)) ]]; then
        echo "Nothing was queued: Slurm's controller does not answer (scontrol ping), so it was not asked. The same command later may do." >&2
        exit "$UNREACHABLE"
    fi
    die "Nothing was queued: Slurm refuses the flags above."
}

nothing_queued() {
    echo "Nothing was queued." >&2
    exit 2
}

# for --only-check
say_only_checked() {
    local checked="the check passed, and Slurm takes it."
    [[ $CHECK != 0 ]] || checked="Slurm takes it; nothing else was checked (--check 0)."
    [[ $ONLY_CHECK == quietly ]] || echo "Nothing was queued (--only-check 1): $checked" >&2
}

# --check and --only-check have values; `quietly` is two_stage.sh's, which speaks for three jobs
check_check() {
    [[ $CHECK =~ ^(0|1|quick)$ ]] || {
        wrong "--check $CHECK must be 0 or 1 or quick: see --help."
        CHECK=1
    }
    [[ $ONLY_CHECK =~ ^([01]|quietly)$ ]] || {
        wrong "--only-check $ONLY_CHECK must be 0 or 1: see --help."
        ONLY_CHECK=1
    }
}
