"""Wrong lines of the launch check, with what it says of them and its remedies."""

LLAMA3 = "!--use-rope-scaling !--rope-scaling-factor"
RECOMPUTE = "!--recompute-method !--recompute-num-layers"

ROUNDS = {
    "a factor without its switch": (
        "!--use-rope-scaling",
        "--rope-scaling-factor 8.0 means nothing without --use-rope-scaling: leave it out, or add that.",
        [LLAMA3, ""],
    ),
    "a factor of YaRN's": (
        "--rotary-scaling-factor 4",
        "leave it out, or use --position-embedding-type yarn in place of --use-rope-scaling and --rope-scaling-factor 8.0, or "
        "--rope-scaling-factor 4, Llama 3's, in its place.",
        ["", f"{LLAMA3} --position-embedding-type yarn --rotary-scaling-factor 4", "--rope-scaling-factor 4"],
    ),
    "the same without Llama's": (
        f"{LLAMA3} --rotary-scaling-factor 4",
        "use --position-embedding-type yarn, or --use-rope-scaling --rope-scaling-factor 4, Llama 3's, in its place.",
        [
            f"{LLAMA3} --position-embedding-type yarn --rotary-scaling-factor 4",
            f"{LLAMA3} --use-rope-scaling --rope-scaling-factor 4",
        ],
    ),
    "YaRN": (
        "--position-embedding-type yarn",
        "--use-rope-scaling and --rope-scaling-factor 8.0 are not read with --position-embedding-type yarn: leave them out.",
        [f"{LLAMA3} --position-embedding-type yarn"],
    ),
    "a warm-up in samples": (
        "--lr-warmup-samples 1600",
        "--lr-warmup-samples 1600 is not read beside --train-iters 20000: leave it out.",
        [""],
    ),
    "the same without a fraction": (
        "!--lr-warmup-fraction --lr-warmup-samples 1600",
        "use --lr-warmup-iters 100 in its place.",
        ["!--lr-warmup-fraction --lr-warmup-iters 100"],
    ),
    "a decay in samples": ("--lr-decay-samples 160000", "use --lr-decay-iters 10000", ["--lr-decay-iters 10000"]),
    "a fall in samples": (
        "--lr-decay-style WSD --lr-wsd-decay-samples 16000",
        "use --lr-wsd-decay-iters 1000 in its place.",
        ["--lr-decay-style WSD --lr-wsd-decay-iters 1000"],
    ),
    "a warm-up longer than the decay": (
        "--lr-decay-iters 100 --lr-warmup-iters 200",
        "use --lr-warmup-fraction 0.02 alone",
        ["--lr-decay-iters 100 --lr-warmup-fraction 0.02"],
    ),
    "a weight decay that falls": (
        "--weight-decay-incr-style linear --start-weight-decay 0.3 --end-weight-decay 0.2",
        "use --start-weight-decay 0.2 --end-weight-decay 0.3",
        ["--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.3"],
    ),
    "halves of a width": (
        "--ffn-hidden-size 14338",
        "must be a multiple of 4 (2 tensor-parallel ranks, each with halves for --swiglu): use 14336 or 14340.",
        ["--ffn-hidden-size 14336", "--ffn-hidden-size 14340"],
    ),
    "widths of experts": (
        "--num-experts 8 --moe-ffn-hidden-size 1023 --moe-shared-expert-intermediate-size 513",
        "--moe-ffn-hidden-size 1023 must be a multiple of 2",
        ["--num-experts 8 --moe-ffn-hidden-size 1022 --moe-shared-expert-intermediate-size 514"],
    ),
    "experts as wide as the MLP": (
        "--num-experts 8 --expert-tensor-parallel-size 8 --ffn-hidden-size 1028",
        "--ffn-hidden-size 1028 must be a multiple of 8 (8 tensor-parallel ranks of experts): use 1024 or 1032.",
        ["--num-experts 8 --expert-tensor-parallel-size 8 --ffn-hidden-size 1032"],
    ),
    "dense layers between such experts": (
        "--num-experts 8 --expert-tensor-parallel-size 8 --ffn-hidden-size 1028 --moe-layer-freq 2",
        "must be a multiple of 8 (2 tensor-parallel ranks, each with halves for --swiglu and 8 tensor-parallel ranks of",
        ["--num-experts 8 --expert-tensor-parallel-size 8 --ffn-hidden-size 1024 --moe-layer-freq 2"],
    ),
    "a width that is no layer's": (
        "--num-experts 8 --moe-ffn-hidden-size 1024 --ffn-hidden-size 1023",
        "--ffn-hidden-size 1023 must be a multiple of 4 (2 tensor-parallel ranks, each with halves for --swiglu)",
        [
            "--num-experts 8 --moe-ffn-hidden-size 1024 --ffn-hidden-size 1025",
            "--num-experts 8 --expert-tensor-parallel-size 1 --ffn-hidden-size 1023 !--swiglu",
        ],
    ),
    "tokens of tensor-parallel ranks": (
        "--attention dense --context-parallel-size 1 --global-batch-size 32 --seq-length 131071",
        "--seq-length 131071 must be a multiple of 2 with --sequence-parallel",
        ["--attention dense --context-parallel-size 1 --global-batch-size 32 --seq-length 131070"],
    ),
    "a method of recomputation": (
        "--recompute-granularity selective",
        "--recompute-method uniform --recompute-num-layers 1 are of --recompute-granularity full: leave them out",
        [f"{RECOMPUTE} --recompute-granularity selective", "--recompute-granularity full"],
    ),
    "modules": (
        f"{RECOMPUTE} --recompute-granularity selective --recompute-modules mlp attn",
        "--recompute-modules attn is not known: use some of core_attn,",
        [f"{RECOMPUTE} --recompute-granularity selective --recompute-modules mlp core_attn"],
    ),
    "graphs beside recomputation": (
        "--cuda-graph-impl local",
        "use --cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad, --recompute-granularity selective without "
        "--recompute-method and --recompute-num-layers",
        [
            "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad",
            f"{RECOMPUTE} --recompute-granularity selective --cuda-graph-impl local",
        ],
    ),
    "a second activation": ("--quick-geglu", "--swiglu and --quick-geglu exclude each other", ["!--swiglu --quick-geglu"]),
    "parameters of eight bits": (
        "--fp8-param-gather",
        "--fp8-param-gather is of --fp8-format: add that",
        ["--fp8-param-gather --fp8-format hybrid"],
    ),
    "batches in steps": (
        "--rampup-batch-size 8 8 1000",
        "use --step-batch-size-schedule in place of --global-batch-size",
        ["!--global-batch-size --step-batch-size-schedule 0:8"],
    ),
    "the same beside a batch": (
        "--step-batch-size-schedule 0:8",
        "--step-batch-size-schedule and --global-batch-size exclude each other: leave one of them out",
        ["!--global-batch-size --step-batch-size-schedule 0:8"],
    ),
    "a batch of evaluation": (
        "--eval-micro-batch-size 3",
        "must be a multiple of 3 (--eval-micro-batch-size 3 x 1 data-parallel ranks): use --eval-global-batch-size 15 or 18",
        ["--eval-micro-batch-size 3 --eval-global-batch-size 18"],
    ),
    "offloading": (
        "!--use-distributed-optimizer !--overlap-param-gather --optimizer-cpu-offload",
        "needs --use-precision-aware-optimizer and --use-distributed-optimizer: add them",
        ["--optimizer-cpu-offload --use-precision-aware-optimizer"],
    ),
    "instances of the optimizer": ("--num-distributed-optimizer-instances 3", "must divide the 4 data- and", [""]),
    "saves between saves": (
        "--non-persistent-save-interval 100",
        "add --non-persistent-ckpt-type global, or leave it out",
        ["--non-persistent-save-interval 100 --non-persistent-ckpt-type global"],
    ),
    "an initialization": ("--init-method-xavier-uniform", "fails in Megatron 0.19", [""]),
    "layers of eight bits": (
        "--fp8-format hybrid --transformer-impl local",
        "leave it out, or use --transformer-impl transformer_engine",
        ["--fp8-format hybrid"],
    ),
    "experts over tensor-parallel ranks": (
        "!--sequence-parallel --num-experts 8",
        "--num-experts 8 with --tensor-model-parallel-size 2 needs --sequence-parallel: add it.",
        ["--num-experts 8"],
    ),
    "a mask of documents": (
        "--reset-attention-mask",
        "use --dataloader-inter-document-masking and --transformer-impl local without --lighthouse-budget",
        ["!--lighthouse-budget --dataloader-inter-document-masking --transformer-impl local"],
    ),
    "a loader": ("--dataloader-type external", "use single or cyclic", ["--dataloader-type single"]),
    "a share of channels": ("--kv-channels 64 --rotary-percent 0.02", "use --rotary-percent 1.", ["--kv-channels 64"]),
    "a flag that was": ("--batch-size 8", "use --micro-batch-size in its place", ["--micro-batch-size 1"]),
    "context-parallel ranks": (
        "--context-parallel-size 3",
        "= 6 must divide the GPUs of the job, 1 node x 8 = 8: use --context-parallel-size 2 or 4.",
        ["--context-parallel-size 2", "--context-parallel-size 4"],
    ),
    "tensor-parallel ranks": (
        "--tensor-model-parallel-size 16",
        "= 64 must divide the GPUs of the job, 1 node x 8 = 8: use --tensor-model-parallel-size 2.",
        ["--tensor-model-parallel-size 2"],
    ),
    "stages of other sizes": (
        "--pipeline-model-parallel-size 2 --context-parallel-size 2 --decoder-first-pipeline-num-layers 10 "
        "--decoder-last-pipeline-num-layers 20",
        "2 of --num-layers 32 are left to the 0 other stages of --pipeline-model-parallel-size 2, which must have equally "
        "many: use --decoder-first-pipeline-num-layers 12.",
        [
            "--pipeline-model-parallel-size 2 --context-parallel-size 2 --decoder-first-pipeline-num-layers 12 "
            "--decoder-last-pipeline-num-layers 20"
        ],
    ),
    "a first stage of another size": (
        "--pipeline-model-parallel-size 4 --context-parallel-size 1 --decoder-first-pipeline-num-layers 4",
        "28 of --num-layers 32 are left to the 3 other stages of --pipeline-model-parallel-size 4, which must have equally "
        "many: use --decoder-first-pipeline-num-layers 2 or 5.",
        [
            f"--pipeline-model-parallel-size 4 --context-parallel-size 1 --decoder-first-pipeline-num-layers {layers}"
            for layers in (2, 5)
        ],
    ),
    "stages": (
        "--pipeline-model-parallel-size 2",
        "use --context-parallel-size 2, or --pipeline-model-parallel-size 1, or --tensor-model-parallel-size 1, or --nodes 2",
        [
            "--pipeline-model-parallel-size 2 --context-parallel-size 2",
            "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 1",
        ],
    ),
}
"""Words that are wrong, what is said, and for each remedy the words that follow it; of one with a ! the line has none."""
