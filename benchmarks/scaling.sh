#!/usr/bin/env bash
# The scaling study of docs/performance.md on the GPUs of one machine, by launch/local.sh: the 530M recipe, CP 1 and 2, dense and
# Lighthouse, at 32K, 98K and 256K tokens (there with full recompute), and all layers Lighthouse at 98K.
#
# On 2, 4 or 8 GPUs, that of docs/scaling.md: attention alone on 8, 4 and 2 ranks, the points of benchmarks/scaling_points.py, and
# the losses of a small model by every layout.
#
# Usage: benchmarks/scaling.sh --out FOLDER [--part one|first|second|two|all|2|4|8] [--stage study|million|late] [--work FOLDER]
#                              [--from scaling.tgz]
#
#   --part one   one GPU a point, two points at a time, on GPUs 0 and 1 (about five minutes on H100s); first, second: one half of it
#   --part two   two GPUs a point (about seven)
#   --part 8, 4  the study of docs/scaling.md on so many GPUs: what takes all of them, the rest side by side, a million tokens by
#                the recipe, and what can wait
#   --part 2     on two GPUs a million tokens, the layouts and what can wait come first: the rest is little more than one and two do
#   --stage      of 2, 4 and 8 this alone: attention and scaling, the million tokens, or the layouts and what can wait
#   --work       the runs' folders (default: a temporary one); points that are done there are skipped
#   --from       what another machine left of the same --work, unpacked there first
#
# After every point the logs and run.json of all points are in FOLDER/scaling.tgz, and the table and pictures in FOLDER: a machine
# that is taken away leaves what was done. `python -m megatron_lighthouse.plan scaling` makes the table again from them. Where a
# point fails the others go on, and the script ends with 1.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT='' PART=all STAGE='' WORK='' FROM=''
while (($#)); do
    case $1 in
        --out) OUT=$2 ;;
        --part) PART=$2 ;;
        --stage) STAGE=$2 ;;
        --work) WORK=$2 ;;
        --from) FROM=$2 ;;
        *) sed -n '/^# Usage/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
    esac
    shift 2
done
[[ -n $OUT && $PART =~ ^(one|first|second|two|all|2|4|8)$ ]] ||
    { echo "--out FOLDER is needed, and --part is one, first, second, two, all, 2, 4 or 8." >&2 && exit 2; }
[[ -z $STAGE || ($STAGE =~ ^(study|million|late)$ && $PART =~ ^(2|4|8)$) ]] ||
    { echo "--stage is study, million or late, and of --part 2, 4 or 8." >&2 && exit 2; }
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
case $PART in
    2 | 4 | 8) needed=$PART ;;
    first) needed=1 ;;
    *) needed=2 ;;
esac
seen=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) ||
    { echo "$PYTHON has no torch: name another by PYTHON=…, such as .venv/bin/python." >&2 && exit 2; }
((seen >= needed)) || { echo "--part $PART takes $needed GPUs, and $seen can be seen." >&2 && exit 2; }
WORK=${WORK:-$(mktemp -d)}
mkdir -p "$OUT" "$WORK"
[[ -z $FROM ]] || tar -C "$WORK" -xzf "$FROM"
rm -f "$WORK/failed" # what failed, a line each
read -ra text <<<"$("$PYTHON" -c 'from megatron_lighthouse.recipe.presets import default_text; print(*default_text())')"
common=(--text-data "${text[@]}" --global-batch-size 1 --eval-iters 0 --log-interval 1 --log-throughput --seed 7
    --high-priority-stream-groups cp)
long=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --lighthouse-budget 2048)

# points "$2" of the study in folder $1, for $3 iterations; more of Megatron's arguments follow. Data is indexed once a GPU
points() {
    local folder=$WORK/$1 study=$2 iterations=$3 begun=$SECONDS status=0
    launch/local.sh --cluster hgx-h100 --recipe 530m-98k --run "$folder" --study "$study" -- "${common[@]}" \
        --data-cache-path "$WORK/data-${CUDA_VISIBLE_DEVICES:-all}" --train-iters "$iterations" "${@:4}" \
        >"$folder-$study.log" 2>&1 || status=$?
    echo "$1: $study: status $status, $((SECONDS - begun)) s, at $SECONDS s"
    ((status == 0)) || echo "$study: $folder-$study.log" >>"$WORK/failed"
    keep
}

# what is there so far, with the table and pictures that the study has made of it, under a lock: two GPUs keep at once
keep() (
    flock 9
    # 1 is of a log that grows meanwhile
    tar -C "$WORK" -czf "$OUT/scaling.tgz" --exclude='data*' --exclude=tensorboard --exclude=checkpoints --exclude=lock . || (($? == 1))
    cp "$WORK"/study/*.csv "$WORK"/study/*.png "$OUT" 2>/dev/null || true
) 9>"$WORK/lock"

first_gpu() {
    points study "CP=1 SEQ=262144 ATTENTION=dense" 4 "${long[@]}"
    points all-layers "CP=1 SEQ=98304 ATTENTION=lighthouse" 6 --lighthouse-dense-first 0 --lighthouse-dense-last 0
    points study "CP=1 SEQ=32768 ATTENTION=dense" 6 --lighthouse-budget 512
}

second_gpu() {
    points study "CP=1 SEQ=98304 ATTENTION=lighthouse" 6
    points study "CP=1 SEQ=98304 ATTENTION=dense" 6
    points study "CP=1 SEQ=262144 ATTENTION=lighthouse" 6 "${long[@]}"
    points study "CP=1 SEQ=32768 ATTENTION=lighthouse" 6 --lighthouse-budget 512
}

both_gpus() {
    points study "CP=2 SEQ=98304 ATTENTION=lighthouse" 6
    points study "CP=2 SEQ=98304 ATTENTION=dense" 6
    points study "CP=2 SEQ=262144 ATTENTION=lighthouse" 6 "${long[@]}"
    points study "CP=2 SEQ=32768 ATTENTION=lighthouse:dense" 6 --lighthouse-budget 512
    points study "CP=2 SEQ=262144 ATTENTION=dense" 4 "${long[@]}"
}

# attention alone on $1 GPUs, checked first; where that fails, its times at least, with what travels sent by NCCL
attention_on() {
    local folder=$WORK/attention-$1 status=0 begun=$SECONDS tables
    local command=("$PYTHON" benchmarks/context_parallel.py --ranks "$1" --out "$folder" --cases 128K 256K 512K 1M 1M-L3)
    [[ ! -e $folder/times.json ]] || return 0
    mkdir -p "$folder"
    timeout -k 10 360 "${command[@]}" --scorers norm summary dilated >"$folder.log" 2>&1 || status=$?
    echo "attention on $1: status $status, $((SECONDS - begun)) s, at $SECONDS s"
    if ((status)); then
        echo "attention on $1: $folder.log" >>"$WORK/failed"
        LIGHTHOUSE_COPY_ENGINE=0 timeout -k 10 180 "${command[@]}" --out "$folder-nccl" --part time --quick >"$folder-nccl.log" 2>&1 ||
            echo "attention on $1 by NCCL: $folder-nccl.log" >>"$WORK/failed"
    fi
    keep_tables
    mapfile -t tables < <(compgen -G "$WORK/attention-*/times.csv")
    ((${#tables[@]} < 2)) || "$PYTHON" benchmarks/context_parallel_plots.py "${tables[@]}" "$OUT/attention.png"
}

# the points that scaling_points.py gives for "$@"
listed() {
    local list folder study iterations more
    list=$("$PYTHON" benchmarks/scaling_points.py --machine "$PART" "$@")
    while IFS=$'\t' read -r folder study iterations more <&3; do
        read -ra more <<<"$more"
        points "$folder" "$study" "$iterations" "${more[@]}" --text-data "$WORK/data.txt"
        keep_tables
    done 3<<<"$list"
}

# the tables and pictures of all folders, besides those that `keep` leaves
keep_tables() (
    flock 9
    local folder
    for folder in "$WORK"/*/; do
        compgen -G "$folder*.csv" >/dev/null || continue
        mkdir -p "$OUT/$(basename "$folder")"
        cp "$folder"*.csv "$folder"*.json "$folder"*.png "$OUT/$(basename "$folder")" 2>/dev/null || true
    done
) 9>"$WORK/lock"

# so that no run reads any of it twice
make_text() { for _ in {1..8}; do cat "${text[@]}"; done >"$WORK/data.txt"; }

# a small model by every layout that the GPUs have room for, against one GPU
agreement() {
    local folder=$WORK/agreement begun=$SECONDS status=0
    [[ ! -e $folder/done ]] || return 0
    mkdir -p "$folder"
    timeout -k 10 300 "$PYTHON" benchmarks/training_agreement.py --only layouts --at-once 8 --out "$folder" >"$folder.log" 2>&1 ||
        status=$?
    echo "agreement: status $status, $((SECONDS - begun)) s, at $SECONDS s"
    if ((status)); then echo "agreement: $folder.log" >>"$WORK/failed"; else touch "$folder/done"; fi
    cp "$folder"/agreement.json "$OUT" 2>/dev/null || true
    keep
}

wanted() { [[ -z $STAGE || $STAGE == "$1" ]]; }

million() { ! wanted million || listed --gpus "$PART" --stage million; }

# what need not come first
late() {
    local gpus
    wanted late || return 0
    agreement
    for gpus in 8 4 2; do ((gpus > PART)) || listed --gpus "$gpus" --stage late; done
}

# scaling: what takes all GPUs, then side by side what takes fewer; on eight, four work on meanwhile
study() {
    local after=$((PART - 4)) # the first of the last four GPUs; on two GPUs these are the last two
    wanted study || return 0
    ((PART == 2)) || attention_on "$PART"
    listed --gpus "$PART" --stage study
    if ((PART == 8)); then CUDA_VISIBLE_DEVICES=0,1,2,3 on_four & fi
    if ((PART > 2)); then CUDA_VISIBLE_DEVICES=$after,$((after + 1)) listed --gpus 2 --stage study & fi
    CUDA_VISIBLE_DEVICES=$((after + 2)) listed --gpus 1 --stage study --attention lighthouse &
    CUDA_VISIBLE_DEVICES=$((after + 3)) listed --gpus 1 --stage study --attention dense &
    all_end
}

on_four() {
    attention_on 4
    listed --gpus 4 --stage study
}

# wait for what runs beside this script
all_end() {
    local pid
    for pid in $(jobs -p); do wait "$pid" || echo "a process ended early, status $?" >>"$WORK/failed"; done
}

case $PART in
    first) CUDA_VISIBLE_DEVICES=0 first_gpu ;;
    second) CUDA_VISIBLE_DEVICES=1 second_gpu ;;
    two) both_gpus ;;
    4 | 8)
        make_text
        study
        million
        late
        ! wanted late || attention_on 2
        ;;
    2)
        make_text
        million
        late
        study
        ! wanted study || attention_on 2
        ;;
    one | all)
        CUDA_VISIBLE_DEVICES=0 first_gpu &
        CUDA_VISIBLE_DEVICES=1 second_gpu &
        all_end
        [[ $PART == one ]] || both_gpus
        ;;
esac
if [[ -e $WORK/failed ]]; then
    echo "failed:" && cat "$WORK/failed"
    exit 1
fi >&2
