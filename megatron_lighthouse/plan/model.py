"""The shape of a GPT as Megatron builds it: RoPE, RMSNorm, SwiGLU, no biases."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPT:
    """Sizes of a model. Each is the Megatron flag in `FLAGS`."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    dense_first: int = 2
    """Layers at the bottom that stay dense in a Lighthouse run."""
    dense_last: int = 2
    """Layers at the top that stay dense."""
    tied: bool = False
    """Whether embedding and output share their weights: no --untie-embeddings-and-output-weights."""

    def __post_init__(self) -> None:
        for name, flag in FLAGS.items():
            least = 0 if name.startswith("dense") else 1
            if getattr(self, name) < least:
                raise ValueError(f"{flag} {getattr(self, name)} must be at least {least}: use {least} or more.")
        if self.head_dim % 8 or self.head_dim > 256:
            fit = min(256, -(-self.head_dim // 8) * 8)
            raise ValueError(
                f"--kv-channels {self.head_dim} must be a multiple of 8 and at most 256, as attention kernels want: use {fit}."
            )
        if self.heads % self.groups:
            fits = [g for g in range(1, self.heads + 1) if self.heads % g == 0]
            raise ValueError(
                f"--num-query-groups {self.groups} must divide --num-attention-heads {self.heads}: use {_either(fits)}."
            )

    @property
    def lighthouse_layers(self) -> int:
        """Layers that take Lighthouse in a Lighthouse run."""
        return max(0, self.layers - self.dense_first - self.dense_last)

    @property
    def qkv(self) -> int:
        """Columns of the fused projection to queries, keys and values."""
        return (self.heads + 2 * self.groups) * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Parameters in the matrices of one layer: QKV, projection, gate and up, down."""
        return self.hidden * (self.qkv + self.heads * self.head_dim + 3 * self.ffn)

    @property
    def parameters(self) -> int:
        """All parameters: layers with two norms each, the last norm, embedding and output weights, or one for both."""
        layers = self.layers * (self.layer_matrices + 2 * self.hidden)
        return layers + self.hidden + (1 if self.tied else 2) * self.vocab * self.hidden


UNTIED = "--untie-embeddings-and-output-weights"
FLAGS = {
    "layers": "--num-layers",
    "hidden": "--hidden-size",
    "ffn": "--ffn-hidden-size",
    "heads": "--num-attention-heads",
    "groups": "--num-query-groups",
    "head_dim": "--kv-channels",
    "vocab": "--vocab-size",
    "dense_first": "--lighthouse-dense-first",
    "dense_last": "--lighthouse-dense-last",
}


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))
