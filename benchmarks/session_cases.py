"""What benchmarks/session.py runs, in order of worth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A process on some of the GPUs."""

    name: str
    title: str
    words: str
    """Python's: {out} and {work} are the folders of this case and of all, {within} the seconds that it has."""
    gpus: int = 1
    limit: float = 120
    """Seconds after which it is killed."""
    least: float = 40
    """Seconds without which it is not begun."""
    tiny: str = ""
    """Further words, with which it runs on a CPU."""
    needs: str = ""
    """A variable of the environment that has folders to be put before PYTHONPATH; without it the case is left out."""
    after: str = ""
    """A case that must be done."""
    table: str = ""
    """A folder that it shares with cases before it, whose table it goes on with."""

    @property
    def folder(self) -> str:
        """Where it leaves what it finds."""
        return self.table or self.name


FLASH = "FLASH_ATTENTION_4"
LAYERS = "--runs 'lighthouse, first and last two layers dense'"
TRAINED = "benchmarks/training_step.py --out {out} --seq-length 32768 --budget 512 --limit 80"
STEP = f"{TRAINED} {LAYERS}"
FULL = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
EXPERIMENT = "-m experiments --within {within} --work {work}/trained/%s --out {out}/tables --corpus {work}/text"
SMALL = """
    --steps 10 --seq-length 1024 --batch 1 --num-layers 6 --hidden-size 64 --ffn-hidden-size 128 --lighthouse-tile-budget 16
    --loss-sequences 2 --passkey-samples 1 --variables-samples 1 --hindsight-samples 2
"""
NUMBERS = {4: "four", 8: "eight"}
PASSKEY = "--passkey-samples 10"
LONG = f"--steps 3000 {PASSKEY}"
ADAM = "dense mass dense-2 mass-2"
SECOND = {
    "A": "dense norm-60 mean three-levels edge-2k causal",
    "B": "dense-2 norm-60-2 mean-2 three-levels-2 edge-2k-2 causal-2",
    "C": "edge-k edge-4k causal-edge-2k normed normed-mass causal-again",
}


def experiment(
    name: str, title: str, of: str, runs: str, more: str, gpus: int = 1, limit: float = 1650, least: float = 1200
) -> Case:
    """Some of an experiment's runs side by side, which go on where they were cut off while the machine is held."""
    words = f"{EXPERIMENT % name} --experiment {of} --at-once {len(runs.split())} {more} --runs {runs}"
    return Case(name, title, words, gpus, limit, least, SMALL, after="corpus")


def steps_of_layouts(name: str, title: str, runs: str, gpus: int, limit: float, least: float = 100) -> Case:
    """Some of the training runs that take all GPUs of a machine."""
    words = f"benchmarks/layouts.py --gpus {gpus} --out {{out}} --within {{within}} --runs {runs}"
    return Case(name, title, words, gpus, limit, least, "--tiny", table=f"{NUMBERS[gpus]}-steps")


def losses_of_layouts(gpus: int, layouts: str) -> Case:
    """A small model by these layouts, from one checkpoint."""
    words = "benchmarks/training_agreement.py --out {out} --at-once 8 --only 'layouts, bf16'"
    tiny = f"--tiny {gpus} --only 'layouts, fp32' --steps 3 --at-once 1"
    title = f"whether layouts of {gpus} GPUs train alike"
    return Case(f"{NUMBERS[gpus]}-losses", title, f"{words} --layouts {layouts}", gpus, 110, 60, tiny)


def rings(name: str, title: str, tokens: int, limit: float) -> Case:
    """Layers over four GPUs, of rows so long."""
    return Case(name, title, f"benchmarks/rings.py --ranks 4 --out {{out}} --lengths {tokens}", 4, limit, 60, "--device cpu")


FOUR = (
    steps_of_layouts("four-edges", "530M layers at 1M: edge budgets, all alike, 26 of 30", "'530m-1m *'", 4, 270),
    steps_of_layouts("four-million", "Qwen3-0.6B at 1M and 4M", "'qwen3-0.6b-* all *'", 4, 280),
    steps_of_layouts("four-layouts", "TP 2 CP 2 and PP 2 CP 2, by each scheme", "'530m-98k *'", 4, 290),
    rings("four-rings", "documents, Parallax and Wall at CP 4", 98304, 170),
    losses_of_layouts(4, "'?P 2, CP 2, *'"),
    steps_of_layouts("four-dense", "Qwen3-0.6B at 1M, dense", "'qwen3-0.6b-* dense *'", 4, 590, 340),
    rings("four-rings-long", "… and at 262,144 tokens", 262144, 80),
)
"""What four GPUs are for: half an hour at most."""
EIGHT = (
    steps_of_layouts(
        "eight-million", "Qwen3-8B at 1M by its recipe, and with edge budgets", "'* all * TP2 *' '* edge *'", 8, 470, 240
    ),
    steps_of_layouts("eight-layouts", "… by CP 8, and by TP 4 CP 2", "'* CP8 *' '* TP4 *'", 8, 330),
    losses_of_layouts(8, "'CP 8' 'TP ?, CP ?'"),
    steps_of_layouts("eight-dense", "Qwen3-8B at 1M, dense", "'* dense *'", 8, 800, 430),
)
"""What eight GPUs are for, likewise."""
CASES = (
    Case(
        "corpus",
        "the text of the experiments",
        "-m megatron_lighthouse.recipe.corpus --out {work}/text --megabytes 0",
        gpus=0,
        limit=300,
        tiny="--megabytes 1",
    ),
    Case("causal", "a causal selection beside the paper's", "benchmarks/causal.py --out {out}", tiny="--device cpu"),
    Case(
        "rings-documents",
        "packed documents at CP 2",
        "benchmarks/rings.py --out {out} --cases lighthouse 'documents, mean 8K' --lengths 98304",
        2,
        tiny="--device cpu",
    ),
    Case(
        "graphs",
        "whole runs under graphs, to the bit",
        "benchmarks/graphs_training.py --out {out} --within {within}",
        limit=200,
        least=120,
        tiny="--tiny --kinds local",
    ),
    Case(
        "documents",
        "packed documents beside dense",
        "benchmarks/documents.py --out {out}",
        limit=150,
        tiny="--device cpu --tokens 2048",
    ),
    Case("step-graphs", "a step in one graph", f"{STEP} {FULL}", limit=90, tiny="--tiny"),
    Case("step-optimizer", "… and the optimizer's", f"{STEP} {FULL} --optimizer-cuda-graph", limit=90, tiny="--tiny"),
    Case(
        "two-gpus",
        "training steps on one and two GPUs",
        "benchmarks/two_gpus.py --out {out} --within {within}",
        2,
        limit=380,
        least=90,
        tiny="--tiny --runs 'lighthouse 32768 ?gpu*' 'dense 32768 ?gpu'",
    ),
    Case(
        "flash-blocks",
        "FlashAttention 4's blocks over shards",
        "benchmarks/flash_blocks.py --out {out} --within {within} --backends fa4 cudnn",
        limit=150,
        tiny="--device cpu --backends sdpa",
        needs=FLASH,
    ),
    Case(
        "graphs-rounded",
        "the same without deterministic mode",
        "benchmarks/graphs_training.py --out {out} --within {within} --rounded --kinds local full_iteration",
        limit=140,
        least=90,
        tiny="--tiny --kinds local",
    ),
    Case(
        "rings-flash",
        "a layer at CP 2 with FlashAttention 4 and cuDNN",
        "benchmarks/rings.py --out {out} --cases lighthouse --lengths 98304 262144 524288 --inner fa4 cudnn",
        2,
        tiny="--device cpu --inner sdpa",
        needs=FLASH,
    ),
    Case(
        "step-flash",
        "a step in one graph, all attention by FlashAttention 4",
        f"{STEP} {FULL} --optimizer-cuda-graph --attention-backend flash",
        limit=90,
        tiny="--tiny --attention-backend auto",
        needs=FLASH,
    ),
    Case(
        "step-flash-dense",
        "… and a dense one",
        f"{TRAINED} --runs dense --attention-backend flash",
        limit=90,
        tiny="--tiny --attention-backend auto",
        needs=FLASH,
    ),
    *(experiment(f"second-{group}", f"group {group}", "second", runs, "") for group, runs in SECOND.items()),
    experiment("qwen3-causal", "Qwen3-like by Muon, causal, 60%", "qwen3", "causal causal-2", LONG, 2, 650, 480),
    experiment("qwen3-adam-6000", "… by Adam, 6,000 iterations", "qwen3-adam", ADAM, f"--steps 6000 {PASSKEY}", 2, 1650, 1100),
    experiment("qwen3-causal-40", "… by Muon, causal, 40%", "qwen3", "causal-40 causal-40-2", LONG, 2, 650, 480),
    experiment("qwen3-mass-40", "… by Muon, mass, 40%", "qwen3", "mass-40 mass-40-2", LONG, 2, 650, 480),
    *FOUR,
    *EIGHT,
)
