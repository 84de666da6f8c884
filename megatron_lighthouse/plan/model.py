"""The shape of a GPT as Megatron builds it: RoPE, RMSNorm, SwiGLU, no biases, untied embeddings."""

from __future__ import annotations

from dataclasses import dataclass, fields


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

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name.startswith("dense") else 1
            if getattr(self, field.name) < least:
                raise ValueError(
                    f"{FLAGS[field.name]} {getattr(self, field.name)} must be at least {least}: use {least} or more."
                )
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
        """All parameters: layers with two norms each, the last norm, embedding and output weights."""
        return self.layers * (self.layer_matrices + 2 * self.hidden) + self.hidden + 2 * self.vocab * self.hidden


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
