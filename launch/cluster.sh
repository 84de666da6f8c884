# shellcheck shell=bash
# Sourced by common.sh: the cluster file, and what is wrong with it.

# what the scripts need of a cluster file; it may set variables too: environment.sh
CLUSTER_KEYS="NODES GPUS_PER_NODE ARCH GPU PARTITION ACCOUNT QOS TIME SIGNAL_SECONDS MAX_REQUEUES SEGMENT EXCLUSIVE CPUS_PER_TASK
    IMAGE MOUNTS PYTHON CHECK_PYTHON PREFLIGHT PREFLIGHT_SECONDS NUMA"

read_cluster() {
    local file=$1 line key value number=0
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
        [[ $line =~ ^([A-Za-z_0-9]+)=(.*)$ ]] || {
            wrong "$file, line $number: '$line' is not KEY=VALUE."
            continue
        }
        key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        if [[ " $(words "$CLUSTER_KEYS") " == *" $key "* ]]; then
            declare -g "$key=$value"
        elif is_ranks_variable "$key"; then
            ranks_variable "$key" "$value"
        else
            wrong "$file, line $number: $key is not a key of a cluster file: use one of $(words "$CLUSTER_KEYS" "$ENVIRONMENT_KEYS")," \
                "or a variable that begins with one of $ENVIRONMENT_PREFIXES."
        fi
    done <"$file"
    PYTHON=${python:-$PYTHON} CHECK_PYTHON=${check_python:-$CHECK_PYTHON}
}

# what it does not say; then what is wrong with it: NODES, GPUS_PER_NODE and ARCH are empty where they are not known
check_cluster() {
    local key n fit
    : "${TIME:=4:00:00}" "${SIGNAL_SECONDS:=600}" "${MAX_REQUEUES:=10}" "${EXCLUSIVE:=0}" "${NUMA:=1}"
    : "${PREFLIGHT:=1}" "${PREFLIGHT_SECONDS:=600}"
    if [[ -z $PYTHON ]]; then
        PYTHON=python3
        [[ -n $IMAGE || ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
    fi
    [[ -z ${NOWHERE:-} ]] || return 0
    for key in NODES GPUS_PER_NODE SIGNAL_SECONDS MAX_REQUEUES PREFLIGHT_SECONDS; do
        [[ ${!key} =~ ^[0-9]+$ && (${!key} =~ [1-9] || ! $key =~ ^(NODES|GPUS_PER_NODE)$) ]] || {
            wrong "$key='${!key}' in $CLUSTER must be a whole number$([[ $key == *NODE* ]] && echo " of at least 1" || true)."
            if [[ $key == *NODE* ]]; then declare -g "$key="; else declare -g "$key=1"; fi
        }
    done
    for key in EXCLUSIVE PREFLIGHT NUMA; do
        [[ ${!key} =~ ^[01]$ ]] || {
            wrong "$key='${!key}' in $CLUSTER must be 0 or 1."
            declare -g "$key=1"
        }
    done
    [[ $ARCH =~ ^(blackwell|hopper|cpu)$ ]] || {
        wrong "ARCH='$ARCH' in $CLUSTER is not known: use blackwell, hopper or cpu."
        ARCH=''
    }
    [[ -z $GPU || -z $ARCH || "$ARCH $GPU" =~ ^(hopper h[12]00|blackwell g?b200)$ ]] ||
        wrong "GPU='$GPU' in $CLUSTER is no GPU of ARCH=$ARCH: use h100 or h200 with hopper, b200 or gb200 with blackwell, or leave it out."
    [[ -z $SEGMENT ]] || { [[ $SEGMENT =~ ^[0-9]+$ ]] && ((SEGMENT >= 1 && SEGMENT <= 18)); } || {
        wrong "SEGMENT='$SEGMENT' in $CLUSTER must be 1 to 18: an NVLink domain has 18 trays."
        SEGMENT=''
    }
    if [[ -n $SEGMENT && -n $NODES ]] && ((NODES % SEGMENT)); then
        fit=$(for ((n = 1; n <= 18 && n <= NODES; n++)); do ((NODES % n)) || echo "$n"; done)
        n=$((NODES / SEGMENT * SEGMENT))
        wrong "SEGMENT=$SEGMENT in $CLUSTER must divide the $NODES nodes: use SEGMENT=$(words "$fit" | sed 's/ / or /g')," \
            "or --nodes $( ((n == 0)) || echo "$n or ")$((n + SEGMENT))."
    fi
    [[ -z $MOUNTS || -n $IMAGE ]] || wrong "MOUNTS=$MOUNTS in $CLUSTER is for a container: set IMAGE too, or leave it out."
}

# seconds of a time limit as Slurm writes it; 0 is none. What is wrong with another, and a failure
seconds() {
    local days=0 hours=0 minutes=0 rest=0
    if [[ $1 =~ ^([0-9]+)-([0-9]+)(:([0-9]+))?(:([0-9]+))?$ ]]; then
        days=${BASH_REMATCH[1]} hours=${BASH_REMATCH[2]} minutes=${BASH_REMATCH[4]} rest=${BASH_REMATCH[6]}
    elif [[ $1 =~ ^(([0-9]+):)?([0-9]+):([0-9]+)$ ]]; then
        hours=${BASH_REMATCH[2]} minutes=${BASH_REMATCH[3]} rest=${BASH_REMATCH[4]}
    elif [[ $1 =~ ^[0-9]+$ ]]; then
        minutes=$1
    elif [[ ! ${1,,} =~ ^(infinite|unlimited)$ ]]; then
        echo "TIME='$1' (--time, or $CLUSTER) is no time limit of Slurm's: use minutes, hours:minutes:seconds or days-hours."
        return 1
    fi
    echo $(((10#$days * 24 + 10#${hours:-0}) * 3600 + 10#${minutes:-0} * 60 + 10#${rest:-0})) # 10#: 08 is eight
}

# the ranks are told to save SIGNAL_SECONDS before the time limit, which must leave time to train
check_time() {
    local limit
    limit=$(seconds "$TIME") || {
        wrong "$limit"
        return 0
    }
    ((limit == 0 || limit > SIGNAL_SECONDS)) ||
        wrong "TIME=$TIME (--time, or $CLUSTER) must be longer than SIGNAL_SECONDS=$SIGNAL_SECONDS in $CLUSTER, when the ranks save:" \
            "use --time $((SIGNAL_SECONDS / 60 + 10)) or longer, or fewer SIGNAL_SECONDS."
}
