# shellcheck shell=bash
# Sourced by every launch script: options, the cluster file, the recipe, and what they mean for srun and the environment.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LAUNCH")
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck source=launch/environment.sh
source "$LAUNCH/environment.sh"
# shellcheck source=launch/cluster.sh
source "$LAUNCH/cluster.sh"
# shellcheck source=launch/profiler.sh
source "$LAUNCH/profiler.sh"

# what is refused while more can be found: the check says it with all that it finds
WRONG=()
wrong() { WRONG+=("$*"); }

die() {
    printf '%s\n' "${WRONG[@]}" "$*" >&2
    exit 2
}

# where nothing asks the check
die_if_wrong() {
    ((${#WRONG[@]} == 0)) || { printf '%s\n' "${WRONG[@]}" >&2 && exit 2; }
}

# what a script's first comment says
usage() { sed -n '/^# Usage/,/^$/s/^# \{0,1\}//p' "$1"; }

words() { printf '%s\n' "$@" | xargs; }

# of files, without folders and endings
names() { words "${@##*/}" | sed -E 's/\.(env|args)( |$)/\2/g'; }

# options that all scripts share; what follows -- goes to Megatron. A script's own are in OWN: "--flag=VARIABLE …". What is wrong is kept,
# and the rest read all the same; NOWHERE is set where there is no cluster file to say how many GPUs, of which kind, and whose files
parse_options() {
    local script=$1 pair own="--cluster=CLUSTER --recipe=RECIPE --run=RUN --nodes=OVER_NODES --time=OVER_TIME --as=AS"
    own+=" --profile=PROFILE --profile-steps=PROFILE_STEPS --profile-ranks=PROFILE_RANKS ${OWN:-}"
    shift
    CLUSTER='' RECIPE='' RUN='' NOWHERE='' OVER_NODES='' OVER_TIME='' MEGATRON=() AS=train
    PROFILE='' PROFILE_STEPS=11-12 PROFILE_RANKS=0
    read_options "$script" "$own" "$@"
    keep_out_own "$own"
    [[ -z $OVER_NODES || $OVER_NODES =~ ^[1-9][0-9]*$ ]] || {
        wrong "--nodes $OVER_NODES must be a whole number of at least 1."
        OVER_NODES=''
    }
    [[ $AS =~ ^(train|point|evaluation)$ ]] || {
        wrong "--as $AS is not known: use train, point or evaluation."
        AS=train
    }
    check_run
    if [[ -n $CLUSTER ]]; then CLUSTER=$(file_of --cluster "$CLUSTER" "$LAUNCH/clusters" env); fi
    if [[ -n $CLUSTER ]] && can_be_read --cluster "$CLUSTER"; then
        CLUSTER=$(realpath "$CLUSTER")
        read_cluster "$CLUSTER"
    else
        NOWHERE=1
        read_cluster /dev/null
    fi
    NODES=${OVER_NODES:-$NODES} TIME=${OVER_TIME:-$TIME}
    check_cluster
    if [[ -n $RECIPE ]]; then RECIPE=$(file_of --recipe "$RECIPE" "$LAUNCH/recipes" args); fi
    if [[ -n $RECIPE ]] && can_be_read --recipe "$RECIPE"; then
        RECIPE=$(realpath "$RECIPE")
        read_recipe "$RECIPE"
    else
        die_if_wrong # there is no model of which more could be said
    fi
    [[ -z $ARCH || $ARCH == cpu ]] || say_allocator
    check_profiler
}

# the options among "$@" in their variables, for script $1 with those in $2; an option of Megatron's is kept as if it stood behind the --
read_options() {
    local script=$1 own=$2 pair megatrons given=' '
    shift 2
    while (($#)); do
        case $1 in
            -h | --help) usage "$script" && exit 0 ;;
            --)
                shift
                MEGATRON+=("$@")
                break
                ;;
        esac
        for pair in $own; do
            [[ $1 == "${pair%%=*}" ]] || continue
            given+="$1 "
            if [[ -n ${2:-} && $2 != -- && ($1 == --sbatch || $2 != --*) ]]; then
                declare -g "${pair#*=}=$2"
                shift 2
            else
                wrong "$1 needs a value${2:+, and $2 follows it}: see --help."
                shift
                (($# == 0)) || [[ -n $1 ]] || shift # an empty one
            fi
            continue 2
        done
        wrong "$1 is not an option of $(basename "$script"): see --help. Megatron's arguments come after a --."
        if is_megatrons "${1%%=*}"; then megatrons=1; else megatrons=''; fi
        while :; do # with its values
            [[ -z $megatrons ]] || MEGATRON+=("$1")
            shift
            (($#)) && [[ $1 != --* && $1 != -h ]] || break
        done
    done
    for pair in --cluster --recipe --run; do
        [[ $given == *" $pair "* ]] || wrong "$pair is missing: see --help."
    done
}

is_megatrons() { grep -q "\"$1\"" "$ROOT/megatron_lighthouse/mcore/command_line/megatron_flags.jsonl"; }

# take options of the script, "--flag=VARIABLE …" in $1, out of MEGATRON, but those of which Megatron has one too
keep_out_own() {
    local word kept=() skip='' own
    own=" $(words "$1" | sed -E 's/=[A-Z_]+//g') "
    for word in "${MEGATRON[@]}"; do
        if [[ $word == --* && $own == *" ${word%%=*} "* ]] && ! is_megatrons "${word%%=*}"; then
            wrong "$word after the -- is an option of this script: put it before the --."
            [[ $word == *=* ]] || skip=1
        elif [[ -n $skip && $word != --* ]]; then
            skip=''
        else
            skip='' kept+=("$word")
        fi
    done
    MEGATRON=("${kept[@]}")
}

# the file that $1 names as $2: itself, or one of folder $3, without its ending $4
file_of() {
    if [[ ! -f $2 && $2 != */* && -f $3/${2%."$4"}.$4 ]]; then
        echo "$3/${2%."$4"}.$4"
    else
        echo "$2"
    fi
}

can_be_read() {
    local folder=$LAUNCH/clusters ending=env
    [[ $1 == --cluster ]] || folder=$LAUNCH/recipes ending=args
    [[ ! -d $2 && -r $2 ]] && return
    wrong "$1 $2 $([[ -d $2 ]] && echo "is a folder" || echo "cannot be read"): give a file, or one of $(names "$folder"/*."$ending")."
    return 1
}

# RUN is a folder that may be written, or can be made; where it is none, another for the rest of the check
check_run() {
    local at why
    [[ -n $RUN ]] || RUN=$ROOT # which was said
    RUN=$(realpath -ms "$RUN") # whoever runs or queues something makes the folder
    at=$RUN
    while [[ ! -e $at && ! -L $at ]]; do at=$(dirname "$at"); done
    if [[ ! -d $at ]]; then
        why="is no folder"
    elif [[ ! -w $at || ! -x $at ]]; then
        why="may not be written by $(id -un)"
    else
        return 0
    fi
    wrong "--run $RUN $([[ $at == "$RUN" ]] || echo "cannot be made: $at ")$why: name a folder that you may write, on a file system that" \
        "all nodes share."
    RUN=$ROOT
}

# line $2 of file $1, which the caller has in its variable line, as text from any editor: without a byte order mark or a DOS line end
clean_line() {
    [[ $2 != 1 ]] || line=${line#$'\xef\xbb\xbf'}
    line=${line%$'\r'}
    local read=${line%%#*}
    [[ ${read//$'\t'/} != *[[:cntrl:]]* && $read != *$'\xc2\xa0'* && $read != $'\xff\xfe'* && $read != $'\xfe\xff'* ]] ||
        die "$1, line $2: $(printf %q "$line") has a character that no blank or word has: write plain blanks, and UTF-8."
}

# a recipe: Megatron's arguments, words apart by blanks, # begins a comment
read_recipe() {
    local file=$1 line found=() number=0
    RECIPE_ARGUMENTS=()
    # shellcheck disable=SC2094 # clean_line names the file, and writes none
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        clean_line "$file" $number
        read -ra found <<<"${line%%#*}" || true
        RECIPE_ARGUMENTS+=("${found[@]}")
    done <"$file"
}

# the run's whole command line in ARGUMENTS: the recipe, the folders of --run, what stood after --, and what --as and --profile add:
# a run takes CUDA graphs where they are right; a study's point, which is compared with the plan, and an evaluation do not
# shellcheck disable=SC2034 # the scripts run MODULE
run_arguments() {
    local word first=() folders=(--tensorboard-dir "$RUN/tensorboard" --data-cache-path "$RUN/data") last=()
    for word in "${RECIPE_ARGUMENTS[@]}" "${MEGATRON[@]}"; do
        case $word in
            --save | --load | --save=* | --load=*)
                wrong "$word is set by --run, so that a requeued job finds its checkpoint: leave it out (--pretrained-checkpoint starts from another)."
                ;;
            --profile)
                wrong "--profile after the -- is Megatron's: give this script --profile nsys or --profile torch before it."
                ;;
        esac
    done
    case $AS in
        train)
            first=(--graphs auto) # the recipe may say otherwise
            folders+=(--save "$RUN/checkpoints" --load "$RUN/checkpoints" --exit-signal-handler)
            ;;
        point) last=(--log-interval 1 --log-throughput) ;; # no checkpoint: it is short, and begins again
        evaluation)
            folders+=(--load "$RUN/checkpoints" --exit-on-missing-checkpoint)
            last=(--skip-train)
            ARGUMENTS=("${RECIPE_ARGUMENTS[@]}" "${MEGATRON[@]}")
            [[ $(argument --attention dense) != lighthouse ]] || last=(--attention "$(stage2_attention)" --skip-train)
            ;;
    esac
    # an --evaluate that asks for more than the validation loss would name megatron_lighthouse.recipe.evaluate here
    MODULE=megatron_lighthouse.pretrain_gpt
    ARGUMENTS=("${first[@]}" "${RECIPE_ARGUMENTS[@]}" "${folders[@]}" "${MEGATRON[@]}" "${last[@]}")
    profiler_arguments
}

# the value of flag $1 in ARGUMENTS, the last one counting, as for Megatron; else $2
argument() {
    local i value=$2
    for ((i = 0; i < ${#ARGUMENTS[@]}; i++)); do
        case ${ARGUMENTS[i]} in
            "$1") value=${ARGUMENTS[i + 1]:-} ;;
            "$1"=*) value=${ARGUMENTS[i]#*=} ;;
        esac
    done
    printf '%s\n' "$value"
}

# what a run with Lighthouse attends by in stage 2: what it is around, of which softmax is the dense one
stage2_attention() {
    local around
    around=$(argument --lighthouse-around softmax)
    [[ $around != softmax ]] || around=dense
    printf '%s\n' "$around"
}

# the iteration of the last whole checkpoint
iteration() { cat "$RUN/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# the last that Slurm still knows of the jobs queued for RUN whose numbers are in RUN/logs/NAME.jobs, for each NAME given (train,
# evaluation, a study's point, which has TASK's number ARRAY_TASK); empty where there is none
job_under_way() {
    local name numbers=''
    for name in "$@"; do
        [[ ! -s $RUN/logs/$name.jobs ]] || numbers+=$(paste -sd, "$RUN/logs/$name.jobs"),
    done
    [[ -z $numbers ]] || squeue -h -r -o %i -j "${numbers%,}" 2>/dev/null | sort -V | tail -n 1 || true
}

# whether there is nothing left to do: by the checkpoint (an --exit-interval is reached only beyond FIRST, where the job began), by a
# point's log, by the evaluation's result
finished() {
    local reached every last
    reached=$(iteration) every=$(argument --exit-interval 0) last=$(argument --train-iters 0)
    case $AS in
        train) ((reached > 0)) && ((reached >= last || (every > 0 && reached % every == 0 && reached > ${FIRST:-0}))) ;;
        point) grep -aqsE "iteration +$last/ +$last \|" "$RUN"/logs/*.log ;;
        evaluation) evaluated ;;
    esac
}

# whether RUN/evaluation.json is that of the last checkpoint
evaluated() { grep -qs "\"iteration\": $(iteration)," "$RUN/evaluation.json"; }

# RUN/evaluation.json from the log $1 of an evaluation; fails where there is no loss in it
write_evaluation() {
    local line number='([0-9.E+-]+)'
    line=$(grep -aE 'validation loss at iteration [0-9]+ on validation set' "$1" | tail -n 1) || return 1
    [[ $line =~ iteration\ ([0-9]+)\ .*\ loss\ value:\ $number\ .*PPL:\ $number ]] || return 1
    printf '{"iteration": %d, "attention": "%s", "seq_length": %d, "eval_iters": %d, "validation_loss": %s, "perplexity": %s}\n' \
        "${BASH_REMATCH[1]}" "$(argument --attention dense)" "$(argument --seq-length 0)" "$(argument --eval-iters 100)" \
        "${BASH_REMATCH[2]}" "${BASH_REMATCH[3]}" >"$RUN/evaluation.json"
}
