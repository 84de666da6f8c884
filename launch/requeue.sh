# shellcheck shell=bash
# Sourced by pretrain.sbatch: how a start of a job ended, and whether it begins again. Only what may end otherwise does.

restarts=${SLURM_RESTART_COUNT:-0}
cancelled=0 # 1 by a TERM: scancel and the time limit itself reach the script, the warning before it only the ranks
# the last task of an array has the array's own number as SLURM_JOB_ID, which names all its tasks to scontrol
JOB=${SLURM_JOB_ID:-}
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

say() { echo "$(date '+%F %T') job $JOB, restart $restarts: $*"; }

# where this start begins, in `began`. RUN/logs/JOB.began has where the job's first start began. JOB.requeues is what the last start
# that was requeued leaves: how many in a row gained nothing, and how it ended. A restart by Slurm itself, after a dead node, leaves
# both as they are
remember_start() {
    began=$(iteration)
    ((restarts)) || { rm -f "$RUN/logs/$JOB.requeues" && echo "$began" >"$RUN/logs/$JOB.began"; }
    # shellcheck disable=SC2034 # for finished
    FIRST=$(cat "$RUN/logs/$JOB.began" 2>/dev/null || echo 0)
}

# how many starts in a row gained no iteration: $1 is where this one began, $2 how many before it gained none
fruitless() { (($(iteration) > $1)) && echo 0 || echo $(($2 + 1)); }

# the status of the rank that failed first, or of any that would fail again, by the log $1: srun's own, $2, may be of one that it
# killed for that
first_status() {
    local says='launch: rank [0-9]+ ended with status' found
    found=$(grep -aosE "$says (2|16|126|127)\b" "$1" | head -n 1) || true
    [[ -n $found ]] || found=$(grep -aosE "$says [0-9]+" "$1" | head -n 1) || true
    found=${found:-$2}
    echo "${found##* }"
}

# the last iteration in the log $1
last_logged() { grep -aosE 'iteration +[0-9]+/' "$1" | tail -n 1 | grep -oE '[0-9]+' || echo none; }

# end the job where the first start shows already that another would be the same: status $1, log $2
refuse_to_repeat() {
    case $1 in
        2) say "the command line is refused, at the end of $2: not requeued" ;;
        16) # EXIT_CODE_RESUME_TO_DISAMBIGUATE of megatron.core.rerun_state_machine: computed again, the result was the same
            say "a loss, a gradient or a weight is not finite, and would be so again: see $2. Not requeued; the last checkpoint is that" \
                "of iteration $(iteration)"
            ;;
        126 | 127) say "a program is not there or may not be run, at the end of $2: not requeued" ;;
        *) return 0 ;;
    esac
    exit "$1"
}

# end this start, with status $1 and log $2 (none where no rank has started), and queue the job again unless that gained nothing too
# often, or ended as the start before did
requeue() {
    local status=$1 ending count=0 before='' try
    ((cancelled == 0)) || { say "cancelled: not requeued" && exit 1; }
    [[ ! -s $RUN/logs/$JOB.requeues ]] || read -r count before <"$RUN/logs/$JOB.requeues"
    count=$(fruitless "$began" "$count")
    ending="$status $(iteration) $(last_logged "${2:-/dev/null}")"
    ((status)) || status=1 # saved, and not done
    if ((count > MAX_REQUEUES)); then
        say "MAX_REQUEUES=$MAX_REQUEUES is reached, $count starts in a row without gain: not requeued; the same command goes on from iteration $(iteration)"
        exit "$status"
    elif ((count > 1)) && [[ -n ${2:-} && $ending == "$before" && ! $status =~ ^(143|151)$ ]]; then # SIGTERM and SIGURG came from outside
        say "status $1 twice in a row at the same place, and no iteration gained: not requeued. What fails is at the end of $2;" \
            "the same command goes on from iteration $(iteration)"
        exit "$status"
    fi
    echo "$count $ending" >"$RUN/logs/$JOB.requeues"
    for try in {1..9}; do # five minutes, for a controller that restarts
        ((cancelled == 0)) || exit "$status"
        if scontrol requeue "$JOB"; then
            say "requeued"
            sleep 60 || true # Slurm ends this script
            exit "$status"
        fi
        sleep $((try * try)) || true
    done
    say "scontrol requeue failed $try times: not requeued; the same command goes on from iteration $(iteration)"
    exit "$status"
}
