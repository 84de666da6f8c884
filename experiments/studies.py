"""The runs of both kinds of 'parallax', and of 'wall': one attention throughout, with as many parameters as softmax. Ours."""

from __future__ import annotations

from experiments.run import REFERENCE, Run

GPT_39M = "--num-layers 12 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 4 --rotary-base 500000"
"""4 heads of 128 channels, which the kernels of Wall are for."""
NARROWER = "--ffn-hidden-size 1240"
"""Takes 3 x 512 x 168 = 258,048 weights of a layer's MLP, for 512 x 512 = 262,144 of `linear_r` or `linear_g`."""
MUON = "--optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-extra-scale-factor 0.2"
"""Updates of Adam's size, by which its learning rate and weight decay serve both (arXiv 2502.16982)."""

PARALLAX_TITLE = "Parallax and softmax, by Adam and by Muon, at 16K; they share GPUs"
PARALLAX = {  # in an order in which two GPUs have as much to do
    REFERENCE: Run("softmax, Adam", against=()),
    "parallax": Run("Parallax, Adam", attention="parallax", model=NARROWER),
    "parallax-muon": Run(
        "Parallax, Muon", attention="parallax", model=f"{NARROWER} {MUON}", against=("dense-muon", REFERENCE, "parallax")
    ),
    "dense-muon": Run("softmax, Muon", model=MUON),
}
NORMED_TITLE = "the same with normed queries, keys and r, and batches of two; they share GPUs"
NORMED = f"{GPT_39M} --qk-layernorm"
WALL_TITLE = "Wall and softmax with three kinds of positions, at 2K and read to 32K; they share GPUs"
WALL = {
    REFERENCE: Run("RoPE, base 10,000", model="--rotary-base 10000", against=()),
    "rope-500k": Run("RoPE, base 500,000"),
    "nope": Run("no positions", model="--position-embedding-type none"),
    "wall": Run("Wall", attention="wall", model=f"{NARROWER} --position-embedding-type none"),
}
