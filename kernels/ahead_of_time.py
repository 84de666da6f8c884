"""`python -m megatron_lighthouse.kernels.ahead_of_time`: compile every kernel for GPUs that need not be there.

Reports registers, shared memory and spills of each kernel for Hopper and Blackwell.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lighthouse.kernels import descriptors, placed
from megatron_lighthouse.kernels.launch import DEFAULTS, launch, padded
from megatron_lighthouse.kernels.lighthouse import attended, causal
from megatron_lighthouse.kernels.lighthouse.edge import edge_kernel
from megatron_lighthouse.kernels.lighthouse.gather import gather_backward_kernel, gather_forward_kernel
from megatron_lighthouse.kernels.lighthouse.mass import column_blocks_of, columns_kernel, rows_kernel
from megatron_lighthouse.kernels.lighthouse.mass_finer import finer_kernel
from megatron_lighthouse.kernels.lighthouse.packed import deal
from megatron_lighthouse.kernels.lighthouse.packed.attended import packed_attended_kernel, stages_on
from megatron_lighthouse.kernels.lighthouse.packed.gather import packed_gather_backward_kernel, packed_gather_forward_kernel
from megatron_lighthouse.kernels.lighthouse.packed.scatter import packed_scatter_backward_kernel, packed_scatter_forward_kernel
from megatron_lighthouse.kernels.lighthouse.packed.score import packed_score_kernel
from megatron_lighthouse.kernels.lighthouse.packed.select import packed_block_of, packed_place_kernel, packed_refine_kernel
from megatron_lighthouse.kernels.lighthouse.scatter import scatter_backward_kernel, scatter_forward_kernel
from megatron_lighthouse.kernels.lighthouse.score import blocks_of, coarsen_kernel, score_kernel
from megatron_lighthouse.kernels.lighthouse.select import block_of, limit_of, place_kernel, refine_kernel, warps_of
from megatron_lighthouse.kernels.lighthouse.tiles import HALVES, NEIGHBOURS, NONE
from megatron_lighthouse.kernels.merge import merge_kernel
from megatron_lighthouse.kernels.parallax import tiles
from megatron_lighthouse.kernels.parallax.forward import forward_kernel
from megatron_lighthouse.kernels.parallax.keys import keys_kernel
from megatron_lighthouse.kernels.parallax.queries import queries_kernel
from megatron_lighthouse.kernels.wall import crossing, decays, gathered, halving, halving_backward, halving_sums
from megatron_lighthouse.kernels.wall import tiles as wall_tiles
from megatron_lighthouse.kernels.wall.forward import forward_kernel as wall_forward_kernel
from megatron_lighthouse.kernels.wall.keys import keys_kernel as wall_keys_kernel
from megatron_lighthouse.kernels.wall.near import near_kernel
from megatron_lighthouse.kernels.wall.prepare import prepare_kernel
from megatron_lighthouse.kernels.wall.queries import queries_kernel as wall_queries_kernel
from megatron_lighthouse.kernels.wall.suffix import suffix_kernel, totals_kernel
from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.lighthouse.packed.rule import Rule

FP32 = {
    *("p_scores", "p_turns", "p_finer", "p_coarser", "p_squares"),
    *("p_peak", "p_mass"),
    *("p_lse", "p_part_lse", "p_mean", "p_terms"),
    *("p_gate", "p_scalar", "p_totals", "p_delta", "p_sums", "p_sum_dq", "p_sum_dk", "p_sum_dv", "p_scalar_sums"),
    *("p_factor", "p_factors"),
    *("p_row_gates", "p_grad_gates", "p_dg"),
}
OF_ROWS = ("strides_lse", "strides_delta", "strides_scalar_sums")
"""Of [B, H, n]."""
EXACT = (wall_forward_kernel, near_kernel, wall_queries_kernel, wall_keys_kernel)
"""Compiled as they are launched, for ptxas once erred: numbers are no multiples of 16, rows of [B, H, n] lie side by side."""
NEAR_SUMS = ("p_dq", "p_dk", "p_dv")
"""What the near kernel leaves for the others to add to, in fp32."""
FP64 = {"p_between"}
INT32 = {
    *("p_first", "p_ranks", "p_places", "p_documents", "p_tiles", "p_starts", "p_blocks"),
    *("p_bounds", "p_ends", "p_begin", "p_begun"),
    *("p_row_at", "p_gathers_at", "p_scatters_at", "p_flags", "p_before", "p_gathered", "p_scattered"),
    *(f"p_{way}_{table}" for way in ("out", "back") for table in ("leaving", "slots", "returning", "back_slots")),
}
INT64 = {"p_slots", "p_leaving"}
INT16 = {"p_owners", "p_wanted"}
SIZES = 5
"""Of halves in Wall: what Lighthouse gathers of 98,304 tokens."""
TENSOR_MEMORY = 512
"""Columns that Blackwell has for a program."""
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


class Report(NamedTuple):
    """What one kernel takes."""

    kernel: str
    registers: int
    shared_bytes: int
    spilled_bytes: int


def compile_all(capability: int, geometry: Geometry, dtype: str, dim: int) -> Iterator[Report]:
    """Compile the kernels of a layer as they would be launched.

    Args:
        capability: 90 for Hopper, 100 for Blackwell.
        dtype: of Q, K and V: bf16, fp16 or fp32.
        dim: D.
    """
    size: dict[str, Any] = {"D": dim, "BLOCK_D": padded(dim), "P": geometry.pooling, "L": geometry.levels}
    constants: dict[str, Any]
    plain = {"TURN": NONE, "PAIRS": 0, "BEFORE": 0}
    turned = [{"TURN": how, "PAIRS": dim // 2, "BEFORE": 0} for how in (HALVES, NEIGHBOURS)]
    for kernel, step, constants in (
        *((gather_forward_kernel, "collect", how) for how in (plain, *turned)),
        *((gather_backward_kernel, "spread", how) for how in (plain, *turned)),
        (scatter_forward_kernel, "spread", {"HALO": True}),
        (scatter_backward_kernel, "collect", {"HALO": True}),
    ):
        how = launch(step, dim, BYTES[dtype])
        yield _compile(kernel, capability, dtype, {**size, **constants, "BLOCK": how.rows}, how.warps)
    how = launch("spread", dim, BYTES[dtype])
    shape = {"D": dim, "BLOCK_D": padded(dim)}
    yield _compile(merge_kernel, capability, dtype, {**shape, "BLOCK": how.rows}, how.warps)
    constants = {"BLOCK_W": padded(dim), "BLOCK": how.rows}
    yield _compile(placed.taken_kernel, capability, dtype, constants, how.warps)
    yield _compile(placed.placed_kernel, capability, dtype, {**constants, "COPIES": 2}, how.warps)
    yield _compile(edge_kernel, capability, dtype, {**size, "ADD": True}, 1)
    how = launch("score", dim, BYTES[dtype])
    block, digit, fused = blocks_of(geometry, how.rows)
    constants = {**size, "P2": digit, "FUSED": fused, "BLOCK": block}
    yield _compile(score_kernel, capability, dtype, constants, how.warps, enable_fp_fusion=False)
    yield _compile(coarsen_kernel, capability, dtype, {"P": geometry.pooling, "BLOCK": 256}, 4)
    block, one = block_of(geometry)
    levels = {"P": geometry.pooling, "L": geometry.levels}
    constants = {**levels, "TILE_BUDGET": geometry.tile_budget, "PIN_FIRST": True, "BLOCK": block, "ONE": one}
    yield _compile(refine_kernel, capability, dtype, constants, warps_of(block), **limit_of(capability))
    yield _compile(place_kernel, capability, dtype, {**levels, "BLOCK": 256}, 4)
    yield _compile(causal.earlier_kernel, capability, dtype, {"BLOCK": causal.BLOCK}, causal.WARPS)
    blocks = attended.blocks_of(dim, BYTES[dtype])
    constants = attended.constants_of(dim, dim**-0.5, blocks)
    for kernel in (attended.attended_kernel, rows_kernel):
        yield _compile(kernel, capability, dtype, constants, blocks.warps, num_stages=blocks.stages)
    blocks = column_blocks_of(dim, BYTES[dtype])
    constants = attended.constants_of(dim, dim**-0.5, blocks)
    yield _compile(columns_kernel, capability, dtype, constants, blocks.warps, num_stages=blocks.stages)
    how = launch("score", dim, BYTES[dtype])
    block, digit, fused = blocks_of(geometry, how.rows)
    constants = {**size, "P2": digit, "FUSED": fused, "BLOCK": block}
    yield _compile(finer_kernel, capability, dtype, constants, how.warps, enable_fp_fusion=False)


def compile_packed(capability: int, geometry: Geometry, dtype: str, dim: int) -> Iterator[Report]:
    """Compile those over packed documents likewise, with the tiles of `geometry`."""
    window = geometry.pooling ** (geometry.levels - 1)
    rule = Rule(geometry.levels, geometry.pooling, geometry.tile_budget, geometry.seq_length // geometry.tiles // window, 0)
    shape: dict[str, Any] = {"D": dim, "BLOCK_D": padded(dim)}
    levels: dict[str, Any] = {"P": geometry.pooling, "L": geometry.levels}
    for turn in (NONE, HALVES, NEIGHBOURS):
        turned = {"TURN": turn, "PAIRS": dim // 2 if turn else 0, "BEFORE": 0}
        for kernel, step in ((packed_gather_forward_kernel, "collect"), (packed_gather_backward_kernel, "spread")):
            how = launch(step, dim, BYTES[dtype])
            yield _compile(kernel, capability, dtype, {**shape, **levels, **turned, "BLOCK": how.rows}, how.warps)
    for kernel, step in ((packed_scatter_forward_kernel, "spread"), (packed_scatter_backward_kernel, "collect")):
        how = launch(step, dim, BYTES[dtype])
        yield _compile(kernel, capability, dtype, {**shape, **levels, "BLOCK": how.rows}, how.warps)
    how = launch("score", dim, BYTES[dtype])
    block, digit, fused = blocks_of(geometry, how.rows)
    constants = {**shape, **levels, "P2": digit, "FUSED": fused, "BLOCK": block}
    yield _compile(packed_score_kernel, capability, dtype, constants, how.warps, enable_fp_fusion=False)
    block, one = packed_block_of(rule)
    constants = {**levels, "PIN_FIRST": True, "BLOCK": block, "ONE": one}
    yield _compile(packed_refine_kernel, capability, dtype, constants, warps_of(block), **limit_of(capability))
    yield _compile(packed_place_kernel, capability, dtype, {**levels, "BLOCK": 256}, 4)
    for kernel in (deal.flags_kernel, deal.tables_kernel):
        yield _compile(kernel, capability, dtype, {"COPIES": 2, "BLOCK": deal.BLOCK}, 4)
    blocks = attended.blocks_of(dim, BYTES[dtype])
    constants = attended.constants_of(dim, dim**-0.5, blocks)
    yield _compile(packed_attended_kernel, capability, dtype, constants, blocks.warps, num_stages=stages_on(capability, blocks))


def compile_parallax(
    capability: int, dtype: str, dim: int, window: int | None = None, causal: bool = True, documents: bool = False
) -> Iterator[Report]:
    """Compile the kernels of Parallax likewise; `causal`: over a rank's own rows."""
    hopper = capability // 10 == 9
    for kernel, name in ((forward_kernel, "forward"), (queries_kernel, "queries"), (keys_kernel, "keys")):
        blocks = tiles.blocks_of(name, dim, BYTES[dtype], hopper)
        bulk = None if name == "keys" else hopper and BYTES[dtype] == 2
        constants = tiles.constants_of(dim, dim**-0.5, window, causal, blocks, documents, bulk)
        yield _compile(kernel, capability, dtype, constants, blocks.warps, num_stages=blocks.stages)


def compile_wall(capability: int, dtype: str, key_dim: int, value_dim: int, scalar: bool = False) -> Iterator[Report]:
    """Compile the kernels of Wall likewise; `scalar`: with scalar gates."""
    widest, own = max(key_dim, value_dim), {"K": key_dim, "BLOCK_K": padded(key_dim)}
    blocks = wall_tiles.blocks_of("prepare", widest, BYTES[dtype])
    own_channels = {"K": key_dim, "CHANNELS": wall_tiles.channels_of(key_dim)}
    yield _compile(prepare_kernel, capability, dtype, {**own_channels, **wall_tiles.rows_of(blocks.rows)}, blocks.warps)
    for kernel in (totals_kernel, suffix_kernel):
        blocks = wall_tiles.blocks_of("sums", widest, BYTES[dtype])
        yield _compile(kernel, capability, dtype, {**own_channels, "ROWS": blocks.rows}, blocks.warps)
    how: dict[str, bool]
    for kernel, how in (
        (decays.totals_kernel, {"PRODUCT": True}),
        (decays.decay_kernel, {"AFTER": True, "ADD": True}),
        (decays.backward_kernel, {"AFTER": True}),
        (crossing.crossing_kernel, {}),
        (crossing.backward_kernel, {}),
    ):
        blocks = wall_tiles.blocks_of("decay", key_dim, BYTES[dtype])
        yield _compile(kernel, capability, dtype, {**how, **own, "ROWS": blocks.rows}, blocks.warps)
    for kernel in (crossing.between_kernel, crossing.between_backward_kernel):
        yield _compile(kernel, capability, dtype, {"K": key_dim, "BLOCK": wall_tiles.channels_of(key_dim)}, 1)
    yield from _compile_halves(capability, dtype, key_dim, value_dim)
    for kernel, name in (
        (wall_forward_kernel, "forward"),
        (near_kernel, "near"),
        (wall_queries_kernel, "queries"),
        (wall_keys_kernel, "keys"),
    ):
        blocks = wall_tiles.blocks_of(name, widest, BYTES[dtype])
        constants = wall_tiles.constants(key_dim, value_dim, key_dim**-0.5, scalar, dtype == "fp32", blocks.rows)
        constants = wall_tiles.near_constants(constants) if kernel is near_kernel else constants
        yield _compile(kernel, capability, dtype, constants, blocks.warps, num_stages=blocks.stages)


def _compile_halves(capability: int, dtype: str, key_dim: int, value_dim: int) -> Iterator[Report]:
    for kernel, dim in (
        (halving.halves_kernel, key_dim),
        (halving_backward.backward_kernel, key_dim),
        (halving_backward.gates_kernel, key_dim),
        (halving_backward.values_kernel, value_dim),
    ):
        warps = wall_tiles.blocks_of("decay", dim, 4).warps
        yield _compile(kernel, capability, dtype, halving.constants_of(dim, SIZES), warps)
    constants = {name: x for name, x in halving.constants_of(key_dim, SIZES).items() if name != "SIZES"}
    for factors in (True, False):
        yield _compile(halving_sums.sums_kernel, capability, dtype, {"FACTORS": factors, **constants}, 1)


def compile_wall_rows(capability: int, geometry: Geometry, dtype: str, dim: int) -> Iterator[Report]:
    """Compile what gathers rows for Wall likewise."""
    how = gathered.launch_of(dim, geometry.pooling)
    constants = gathered.constants(dim, geometry.levels, geometry.pooling, how)
    for kernel in (gathered.gather_kernel, gathered.gather_backward_kernel):
        yield _compile(kernel, capability, dtype, constants, how.warps)


def _compile(kernel: Any, capability: int, dtype: str, constants: Mapping[str, Any], warps: int, **options: Any) -> Report:
    exact = kernel in EXACT
    sums = NEAR_SUMS if kernel is near_kernel else ()
    signature: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    given: dict[Any, Any] = dict(constants)
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif exact and name in OF_ROWS:
            signature[name] = ("i32", "i32", "constexpr")
            given[i, 2] = 1
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(2)}
        elif name.startswith("strides") or name == "widths":
            signature[name] = ("i32", "i32", "i32")
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
        elif exact and not name.startswith("p_"):
            signature[name] = "i32"
        else:
            wider = {"fp64": FP64, "i32": INT32, "i64": INT64, "i16": INT16}
            kind = "fp32" if name in FP32 or name in sums else next((k for k, names in wider.items() if name in names), dtype)
            signature[name] = f"*{kind}" if name.startswith("p_") else "i32"
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=given, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=DEFAULTS | {"num_warps": warps, **options})
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY:  # Triton has made a kernel that only traps, and says so at launch alone
        raise ValueError(
            f"{compiled.metadata.name} needs {columns} columns of tensor memory, more than {TENSOR_MEMORY}: smaller tiles"
        )
    if "wgmma" in compiled.asm["ptx"] and capability == 90:
        code = descriptors.disassembled(compiled.asm["cubin"], triton.knobs.nvidia.nvdisasm.path)
        wrong = descriptors.problem(code, compiled.metadata.shared)
        if wrong is not None:
            raise ValueError(f"{compiled.metadata.name}: {wrong}")
    registers, stack = descriptors.used(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    return Report(compiled.metadata.name, registers, compiled.metadata.shared, stack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[90, 100], help="90: Hopper, 100: Blackwell")
    parser.add_argument("--dtype", choices=list(BYTES), default="bf16")
    parser.add_argument("--dim", type=int, default=128, help="head dimension")
    names = ("seq_length", "levels", "pooling", "budget", "tile_budget")
    for name, default in zip(names, (98304, 3, 4, 1536, 128), strict=True):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    options = parser.parse_args()
    geometry = Geometry(*(getattr(options, name) for name in names))
    for capability in options.capability:
        print(f"sm_{capability}  {'kernel':32} registers  shared bytes  spilled bytes")
        layer = capability, options.dtype, options.dim
        for report in (
            *compile_all(capability, geometry, *layer[1:]),
            *compile_packed(capability, geometry, *layer[1:]),
            *compile_parallax(*layer),
            *compile_wall(*layer, options.dim),
            *compile_wall_rows(capability, geometry, *layer[1:]),
        ):
            print(f"        {report.kernel:32} {report.registers:9} {report.shared_bytes:13} {report.spilled_bytes:14}")


if __name__ == "__main__":
    main()
