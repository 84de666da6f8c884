# shellcheck shell=bash
# Sourced by the scripts that run a scaling study: its points, and what stands in the run.json of each.

# the names of --attention: what the registry lists, read as text where there may be no Python
known_attentions() { sed -n 's/^register(\([A-Z_]*\))$/\1/p' "$ROOT/megatron_lighthouse/variants.py" | tr A-Z_ a-z-; }

# the points of "CP=1:2 SEQ=32768:98304 ATTENTION=dense:lighthouse" in POINTS, "ATTENTION LENGTH CP" each, the attention changing fastest.
# Without CP or SEQ they are the recipe's. A failure where they cannot be told
study_points() {
    local study=$1 word name names value CP SEQ ATTENTION=dense:lighthouse sizes lengths attentions known size length attention
    local ARGUMENTS=("${RECIPE_ARGUMENTS[@]}" "${MEGATRON[@]}") before=${#WRONG[@]}
    CP=$(argument --context-parallel-size 1) SEQ=$(argument --seq-length '')
    for word in $study; do
        if [[ $word =~ ^(CP|SEQ|ATTENTION)=([^:]+(:[^:]+)*)$ ]]; then
            declare "${BASH_REMATCH[1]}=${BASH_REMATCH[2]}"
        else
            wrong "--study '$study': '$word' is none of CP=…, SEQ=…, ATTENTION=… with values apart by colons:" \
                "use \"CP=1:2 SEQ=32768:98304 ATTENTION=dense:lighthouse\"."
        fi
    done
    for name in --train-iters --exit-interval; do
        value=$(argument $name '')
        [[ ! $value =~ ^0*[12]$ ]] || wrong "$name $value ends a point before its third iteration, the first that has a time of its own" \
            "in the table: use $name 10, or 3 at least."
    done
    [[ -n $SEQ || $study == *SEQ=* ]] || wrong "--study '$study': neither it nor the recipe names a length: add SEQ=32768:98304."
    for name in CP SEQ ATTENTION; do # a point's folder is named by its values
        value=$(words "$(tr : '\n' <<<"${!name}" | sort | uniq -d)")
        [[ -z $value ]] || wrong "--study '$study': $name=${!name} holds $value twice, and a point runs once: leave one of them out."
    done
    IFS=: read -ra sizes <<<"$CP"
    IFS=: read -ra lengths <<<"$SEQ"
    IFS=: read -ra attentions <<<"$ATTENTION"
    for value in "${sizes[@]}" "${lengths[@]}"; do
        [[ $value =~ ^[1-9][0-9]*$ ]] || wrong "--study '$study': CP and SEQ hold whole numbers apart by colons, and '$value' is none:" \
            "write all digits, as 131072 for 128K."
    done
    read -ra known <<<"$(words "$(known_attentions)")"
    names="${known[*]}"
    for attention in "${attentions[@]}"; do
        [[ " ${known[*]} " == *" $attention "* ]] ||
            wrong "--study '$study': ATTENTION holds ${names// / or }, and '$attention' is neither."
    done
    POINTS=()
    for size in "${sizes[@]}"; do
        for length in "${lengths[@]}"; do
            for attention in "${attentions[@]}"; do POINTS+=("$attention $length $size"); done
        done
    done
    ((${#WRONG[@]} == before))
}

# the name of point $1 in NAME, what it adds to Megatron's arguments in POINT
point() {
    local attention length size
    read -r attention length size <<<"$1"
    NAME=$attention-$length-cp$size
    POINT=(--attention "$attention" --seq-length "$length" --max-position-embeddings "$length" --context-parallel-size "$size")
}

# check every point before any runs: "$@" are options of the check, of which --exact takes no more GPUs than one sequence does
check_study() {
    local found points=()
    for found in "${POINTS[@]}"; do
        point "$found"
        points+=(--point "$NAME ${POINT[*]}")
    done
    "$PYTHON" -m megatron_lighthouse.launch.check "${points[@]}" "$@" -- "${ARGUMENTS[@]}"
}

# go to point $1: RUN is its folder, ARGUMENTS its command line
# shellcheck disable=SC2034 # common.sh reads AS
enter_point() {
    point "$1"
    RUN=$RUN/$NAME AS=point MEGATRON+=("${POINT[@]}")
    mkdir -p "$RUN/logs"
    run_arguments
    die_if_wrong
}

# GPUs that one sequence takes
gpus_of_sequence() {
    echo $(($(argument --tensor-model-parallel-size 1) * $(argument --context-parallel-size 1) * $(argument --pipeline-model-parallel-size 1)))
}

# the name that the plan knows this machine's GPUs by; where it cannot be read, as on a login node, what the cluster file says
device() {
    local name
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || name=''
    case $name in
        *GB200*) echo gb200 ;;
        *B200*) echo b200 ;;
        *H200*) echo h200 ;;
        *H100*) echo h100 ;;
        *) echo "$GPU" ;;
    esac
}

quoted() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

# how the point recomputes, in the plan's words
recompute() {
    local words=" ${ARGUMENTS[*]} " found modules=''
    found=$(argument --recompute-granularity none)
    [[ $words != *" --recompute-activations "* ]] || found=selective
    if [[ $found == selective ]]; then # less than the MLP counts as nothing
        [[ $words != *" --recompute-modules"[=\ ]* ]] || modules=${words##*" --recompute-modules"[=\ ]}
        [[ " ${modules%% --*} " == *" mlp "* ]] && found=mlp || found=none
    fi
    echo "$found"
}

# whether run.json says that these very arguments have run, and the log that they ran to the end
point_is_done() { grep -qsF "\"arguments\": $(quoted "${ARGUMENTS[*]}")" "$RUN/run.json" && finished; }

# rows of the vocabulary, as far as the words say them: a tokenizer's own size, which wins over --vocab-size, is not read here
vocabulary() {
    local padded kind
    padded=$(argument --padded-vocab-size '') kind=$(argument --tokenizer-type NullTokenizer)
    if [[ -n $(argument --text-data '') ]]; then
        echo 384 # a text's tokens are bytes: PADDED_VOCABULARY of megatron_lighthouse.mcore.data.text
    elif [[ -z $padded && $kind =~ ^(Null.*|Tik)Tokenizer$ ]]; then
        argument --vocab-size ''
    else
        echo "$padded"
    fi
}

# run.json of the point that ARGUMENTS is, on $1 GPUs: see `python -m megatron_lighthouse.plan scaling --help`. Earlier logs go aside
describe_point() {
    local gpus=$1 pair value apart text
    if compgen -G "$RUN/logs/*.log" >/dev/null; then
        rm -rf "$RUN/logs.before"
        mv "$RUN/logs" "$RUN/logs.before"
        mkdir "$RUN/logs"
    fi
    apart=$((gpus / $(gpus_of_sequence)))
    text="{\"attention\": $(quoted "$(argument --attention dense)"), \"gpus\": $gpus, \"recipe\": $(quoted "$(basename "$RECIPE" .args)")"
    text+=", \"global_batch\": $(argument --global-batch-size $(($(argument --micro-batch-size 1) * apart)))"
    value=$(argument --lighthouse-around '')
    [[ -z $value ]] || text+=", \"around\": $(quoted "$value")"
    text+=", \"recompute\": $(quoted "$(recompute)"), \"cp_comm_type\": $(quoted "$(argument --cp-comm-type p2p)")"
    for pair in seq_length=--seq-length tensor_parallel=--tensor-model-parallel-size context_parallel=--context-parallel-size \
        pipeline_parallel=--pipeline-model-parallel-size levels=--lighthouse-levels pooling=--lighthouse-pooling \
        budget=--lighthouse-budget tile_budget=--lighthouse-tile-budget edge_budget=--lighthouse-edge-budget dense_first=--lighthouse-dense-first \
        dense_last=--lighthouse-dense-last layers=--num-layers hidden=--hidden-size ffn=--ffn-hidden-size \
        heads=--num-attention-heads head_dim=--kv-channels; do
        value=$(argument "${pair#*=}" '')
        [[ -z $value ]] || text+=", \"${pair%%=*}\": $value"
    done
    value=$(vocabulary)
    [[ -z $value ]] || text+=", \"vocab\": $value"
    value=$(argument --num-attention-heads '') # what Megatron takes where a flag is not given
    [[ -z $value || -n $(argument --kv-channels '') ]] || text+=", \"head_dim\": $(($(argument --hidden-size 0) / value))"
    [[ " ${ARGUMENTS[*]} " != *" --group-query-attention "* ]] || value=$(argument --num-query-groups 1)
    [[ -z $value ]] || text+=", \"groups\": $value"
    value=$(device)
    [[ -z $value ]] || text+=", \"device\": $(quoted "$value")"
    [[ -z ${SLURM_JOB_ID:-} ]] || text+=", \"job\": $(quoted "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}")"
    text+=", \"arguments\": $(quoted "${ARGUMENTS[*]}")"
    printf '%s}\n' "$text" >"$RUN/run.json"
}
