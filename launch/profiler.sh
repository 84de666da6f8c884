# shellcheck shell=bash
# Sourced by common.sh: --profile nsys|torch|dlprof, --profile-steps FIRST-LAST, --profile-ranks "RANKS". Traces go to RUN/profile.

# what is wrong with --profile, without which the rest is checked
not_profiled() { wrong "$@" && PROFILE=''; }

check_profiler() {
    local rank first last
    [[ -n $PROFILE ]] || return 0
    [[ $PROFILE =~ ^(nsys|torch|dlprof)$ ]] || not_profiled "--profile $PROFILE is not known: use nsys, torch or dlprof (--cluster names the cluster file)."
    IFS=- read -r first last <<<"$PROFILE_STEPS"
    [[ $first =~ ^[1-9][0-9]*$ && $last =~ ^[1-9][0-9]*$ && first -le last ]] ||
        not_profiled "--profile-steps '$PROFILE_STEPS' must be FIRST-LAST, both profiled: use 11-12."
    for rank in $PROFILE_RANKS; do
        [[ $rank =~ ^[0-9]+$ ]] || not_profiled "--profile-ranks '$PROFILE_RANKS' must be ranks apart by blanks: use 0 or \"0 8\"."
    done
}

# whether the program is there, asked by way of the command "$@" (srun, where it is in a container)
find_profiler() {
    case $PROFILE in
        nsys)
            "$@" bash -c 'command -v nsys' >/dev/null ||
                wrong "--profile nsys: nsys is not on PATH: install Nsight Systems or load its module, or use --profile torch."
            ;;
        dlprof)
            # shellcheck disable=SC2016 # the inner bash expands it
            "$@" bash -c 'command -v dlprof && "$0" -c "import nvidia_dlprof_pytorch_nvtx"' "$PYTHON" >/dev/null 2>&1 ||
                wrong "--profile dlprof: dlprof or nvidia_dlprof_pytorch_nvtx is not here. DLProf's last release was in 2021;" \
                    "--profile nsys and --profile torch show the same ranges."
            ;;
    esac
}

# what --profile adds to ARGUMENTS, and what task.sh must know
profiler_arguments() {
    local first last ranks reached
    [[ -n $PROFILE ]] || return 0
    IFS=- read -r first last <<<"$PROFILE_STEPS"
    read -ra ranks <<<"$PROFILE_RANKS"
    ((last < $(argument --train-iters 0))) ||
        wrong "--profile-steps $PROFILE_STEPS must end before --train-iters $(argument --train-iters 0): a later step writes the trace."
    if [[ $AS == train ]]; then
        reached=$(iteration)
        ((first > reached)) || wrong "--profile-steps $PROFILE_STEPS are past: the run is at iteration $reached. Use later steps, or another --run."
        ((reached == 0)) || [[ $PROFILE != torch ]] ||
            wrong "--profile torch counts from where a process starts, and the run is at iteration $reached: use another --run, or nsys."
    fi
    # Megatron's torch schedule begins a step earlier than its cudaProfilerStart
    [[ $PROFILE == torch ]] || first=$((first - 1)) last=$((last - 1))
    ARGUMENTS+=(--profile)
    [[ $PROFILE != torch ]] || ARGUMENTS+=(--use-pytorch-profiler)
    ARGUMENTS+=(--profile-step-start "$first" --profile-step-end "$((last + 1))" --profile-ranks "${ranks[@]}")
    export LIGHTHOUSE_PROFILER=$PROFILE LIGHTHOUSE_PROFILER_RANKS=$PROFILE_RANKS LIGHTHOUSE_PROFILER_FOLDER=$RUN/profile
}

# the folder, just before the ranks start
make_profile_folder() {
    [[ -n $PROFILE ]] || return 0
    mkdir -p "$RUN/profile"
    # Megatron writes torch's trace to torch_profile beside the TensorBoard folder
    [[ $PROFILE != torch ]] || ln -sfn profile "$RUN/torch_profile"
}

# what turns the traces into a table
say_how_to_report() {
    local file traces=()
    [[ -n $PROFILE ]] || return 0
    for file in "$RUN"/profile/*; do
        [[ $file != *.nsys-rep && $file != *.json && $file != *.json.gz ]] || traces+=("$file")
    done
    ((${#traces[@]})) || { echo "there is no trace in $RUN/profile" && return 0; }
    echo "where the time goes: $PYTHON -m megatron_lighthouse.profiling report ${traces[*]}"
}
