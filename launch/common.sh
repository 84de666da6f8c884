# shellcheck shell=bash
# Sourced by every launch script: options, the cluster file, the recipe, and what they mean for srun and the environment.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LAUNCH")
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck source=launch/environment.sh
source "$LAUNCH/environment.sh"
# shellcheck source=launch/profiler.sh
source "$LAUNCH/profiler.sh"

# what the scripts need of a cluster file; it may set variables too: environment.sh
CLUSTER_KEYS="NODES GPUS_PER_NODE ARCH GPU PARTITION ACCOUNT QOS TIME SIGNAL_SECONDS MAX_REQUEUES SEGMENT EXCLUSIVE CPUS_PER_TASK
    IMAGE MOUNTS PYTHON CHECK_PYTHON PREFLIGHT PREFLIGHT_SECONDS NUMA"

die() {
    printf '%s\n' "$*" >&2
    exit 2
}

# what a script's first comment says
usage() { sed -n '/^# Usage/,/^$/s/^# \{0,1\}//p' "$1"; }

words() { printf '%s\n' "$@" | xargs; }

# of files, without folders and endings
names() { words "${@##*/}" | sed -E 's/\.(env|args)( |$)/\2/g'; }

# options that all scripts share; what follows -- goes to Megatron. A script's own are in OWN: "--flag=VARIABLE …"
parse_options() {
    local script=$1 pair
    shift
    CLUSTER='' RECIPE='' RUN='' OVER_NODES='' OVER_TIME='' MEGATRON=() AS=train
    PROFILE='' PROFILE_STEPS=11-12 PROFILE_RANKS=0
    while (($#)); do
        case $1 in
            -h | --help) usage "$script" && exit 0 ;;
            --)
                shift
                MEGATRON=("$@")
                break
                ;;
        esac
        for pair in --cluster=CLUSTER --recipe=RECIPE --run=RUN --nodes=OVER_NODES --time=OVER_TIME --as=AS \
            --profile=PROFILE --profile-steps=PROFILE_STEPS --profile-ranks=PROFILE_RANKS ${OWN:-}; do
            [[ $1 == "${pair%%=*}" ]] || continue
            (($# > 1)) || die "$1 needs a value."
            declare -g "${pair#*=}=$2"
            shift 2
            continue 2
        done
        die "$1 is not an option of $(basename "$script"): see --help. Megatron's arguments come after a --."
    done
    for pair in --cluster=CLUSTER --recipe=RECIPE --run=RUN; do
        [[ -n $(declare -n value=${pair#*=} && echo "$value") ]] || die "${pair%%=*} is missing: see --help."
    done
    [[ -z $OVER_NODES || $OVER_NODES =~ ^[1-9][0-9]*$ ]] || die "--nodes $OVER_NODES must be a whole number of at least 1."
    [[ $AS =~ ^(train|point|evaluation)$ ]] || die "--as $AS is not known: use train, point or evaluation."
    [[ -e $CLUSTER || $CLUSTER == */* ]] || CLUSTER=$LAUNCH/clusters/$CLUSTER.env
    [[ -e $RECIPE || $RECIPE == */* ]] || RECIPE=$LAUNCH/recipes/$RECIPE.args
    read_cluster "$CLUSTER"
    NODES=${OVER_NODES:-$NODES} TIME=${OVER_TIME:-$TIME}
    check_cluster
    [[ $ARCH == cpu ]] || say_allocator
    check_profiler
    read_recipe "$RECIPE"
    RUN=$(realpath -ms "$RUN") # whoever runs or queues something makes the folder
    check_run
    CLUSTER=$(realpath "$CLUSTER") RECIPE=$(realpath "$RECIPE")
}

# RUN is a folder that may be written, or can be made
check_run() {
    local at=$RUN why
    while [[ ! -e $at && ! -L $at ]]; do at=$(dirname "$at"); done
    if [[ ! -d $at ]]; then
        why="is no folder"
    elif [[ ! -w $at || ! -x $at ]]; then
        why="may not be written by $(id -un)"
    else
        return 0
    fi
    die "--run $RUN $([[ $at == "$RUN" ]] || echo "cannot be made: $at ")$why: name a folder that you may write, on a file system that" \
        "all nodes share."
}

# line $2 of file $1, which the caller has in its variable line, as text from any editor: without a byte order mark or a DOS line end
clean_line() {
    [[ $2 != 1 ]] || line=${line#$'\xef\xbb\xbf'}
    line=${line%$'\r'}
    local read=${line%%#*}
    [[ ${read//$'\t'/} != *[[:cntrl:]]* && $read != *$'\xc2\xa0'* && $read != $'\xff\xfe'* && $read != $'\xfe\xff'* ]] ||
        die "$1, line $2: $(printf %q "$line") has a character that no blank or word has: write plain blanks, and UTF-8."
}

read_cluster() {
    local file=$1 line key value number=0
    [[ -r $file ]] || die "--cluster $file cannot be read: give a file, or one of $(names "$LAUNCH"/clusters/*.env)."
    local python=${PYTHON:-} check_python=${CHECK_PYTHON:-} # the environment wins
    for key in $CLUSTER_KEYS; do declare -g "$key="; done
    read_environment
    # shellcheck disable=SC2094 # clean_line names the file, and writes none
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        clean_line "$file" $number
        line=${line%%[[:space:]]#*}
        line=${line%"${line##*[![:space:]]}"}
        [[ -z $line || $line == \#* ]] && continue
        [[ $line =~ ^([A-Za-z_0-9]+)=(.*)$ ]] || die "$file, line $number: '$line' is not KEY=VALUE."
        key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        if [[ " $(words "$CLUSTER_KEYS") " == *" $key "* ]]; then
            declare -g "$key=$value"
        elif is_ranks_variable "$key"; then
            ranks_variable "$key" "$value"
        else
            die "$file, line $number: $key is not a key of a cluster file: use one of $(words "$CLUSTER_KEYS" "$ENVIRONMENT_KEYS")," \
                "or a variable that begins with one of $ENVIRONMENT_PREFIXES."
        fi
    done <"$file"
    PYTHON=${python:-$PYTHON} CHECK_PYTHON=${check_python:-$CHECK_PYTHON}
}

check_cluster() {
    local key n fit
    : "${TIME:=4:00:00}" "${SIGNAL_SECONDS:=600}" "${MAX_REQUEUES:=10}" "${EXCLUSIVE:=0}" "${NUMA:=1}"
    : "${PREFLIGHT:=1}" "${PREFLIGHT_SECONDS:=600}"
    for key in NODES GPUS_PER_NODE SIGNAL_SECONDS MAX_REQUEUES PREFLIGHT_SECONDS; do
        [[ ${!key} =~ ^[0-9]+$ ]] || die "$key='${!key}' in $CLUSTER must be a whole number."
    done
    ((NODES > 0 && GPUS_PER_NODE > 0)) || die "NODES=$NODES and GPUS_PER_NODE=$GPUS_PER_NODE in $CLUSTER must be at least 1."
    for key in EXCLUSIVE PREFLIGHT NUMA; do
        [[ ${!key} =~ ^[01]$ ]] || die "$key='${!key}' in $CLUSTER must be 0 or 1."
    done
    [[ $ARCH =~ ^(blackwell|hopper|cpu)$ ]] || die "ARCH='$ARCH' in $CLUSTER is not known: use blackwell, hopper or cpu."
    [[ -z $GPU || "$ARCH $GPU" =~ ^(hopper h[12]00|blackwell g?b200)$ ]] ||
        die "GPU='$GPU' in $CLUSTER is no GPU of ARCH=$ARCH: use h100 or h200 with hopper, b200 or gb200 with blackwell, or leave it out."
    [[ -z $SEGMENT ]] || { [[ $SEGMENT =~ ^[0-9]+$ ]] && ((SEGMENT >= 1 && SEGMENT <= 18)); } ||
        die "SEGMENT='$SEGMENT' in $CLUSTER must be 1 to 18: an NVLink domain has 18 trays."
    if [[ -n $SEGMENT ]] && ((NODES % SEGMENT)); then
        fit=$(for ((n = 1; n <= 18 && n <= NODES; n++)); do ((NODES % n)) || echo "$n"; done)
        n=$((NODES / SEGMENT * SEGMENT))
        die "SEGMENT=$SEGMENT in $CLUSTER must divide the $NODES nodes: use SEGMENT=$(words "$fit" | sed 's/ / or /g')," \
            "or --nodes $( ((n == 0)) || echo "$n or ")$((n + SEGMENT))."
    fi
    [[ -z $MOUNTS || -n $IMAGE ]] || die "MOUNTS=$MOUNTS in $CLUSTER is for a container: set IMAGE too, or leave it out."
    if [[ -z $PYTHON ]]; then
        PYTHON=python3
        [[ -n $IMAGE || ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
    fi
}

# seconds of a time limit as Slurm writes it; 0 is none
seconds() {
    local days=0 hours=0 minutes=0 rest=0
    if [[ $1 =~ ^([0-9]+)-([0-9]+)(:([0-9]+))?(:([0-9]+))?$ ]]; then
        days=${BASH_REMATCH[1]} hours=${BASH_REMATCH[2]} minutes=${BASH_REMATCH[4]} rest=${BASH_REMATCH[6]}
    elif [[ $1 =~ ^(([0-9]+):)?([0-9]+):([0-9]+)$ ]]; then
        hours=${BASH_REMATCH[2]} minutes=${BASH_REMATCH[3]} rest=${BASH_REMATCH[4]}
    elif [[ $1 =~ ^[0-9]+$ ]]; then
        minutes=$1
    elif [[ ! ${1,,} =~ ^(infinite|unlimited)$ ]]; then
        die "TIME='$1' (--time, or $CLUSTER) is no time limit of Slurm's: use minutes, hours:minutes:seconds or days-hours."
    fi
    echo $(((10#$days * 24 + 10#${hours:-0}) * 3600 + 10#${minutes:-0} * 60 + 10#${rest:-0})) # 10#: 08 is eight
}

# the ranks are told to save SIGNAL_SECONDS before the time limit, which must leave time to train
check_time() {
    local limit
    limit=$(seconds "$TIME")
    ((limit == 0 || limit > SIGNAL_SECONDS)) ||
        die "TIME=$TIME (--time, or $CLUSTER) must be longer than SIGNAL_SECONDS=$SIGNAL_SECONDS in $CLUSTER, when the ranks save:" \
            "use --time $((SIGNAL_SECONDS / 60 + 10)) or longer, or fewer SIGNAL_SECONDS."
}

# a recipe: Megatron's arguments, words apart by blanks, # begins a comment
read_recipe() {
    local file=$1 line found=() number=0
    [[ -r $file ]] || die "--recipe $file cannot be read: give a file, or one of $(names "$LAUNCH"/recipes/*.args)."
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
                die "$word is set by --run, so that a requeued job finds its checkpoint: leave it out (--pretrained-checkpoint starts from another)."
                ;;
            --profile)
                die "--profile after the -- is Megatron's: give this script --profile nsys or --profile torch before it."
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
