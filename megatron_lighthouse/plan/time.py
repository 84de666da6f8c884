"""Time of a step by part. Seconds. What is fitted comes from `Coefficients`; all else is counted, and said so here.

GPU and host work at once, so a layer takes the longer of the two times (ours). The host is that of `Device.host`; under CUDA
graphs none is waited for.

Not fitted, so assumed: tensor-parallel communication is not hidden, and costs the host what a dense ring of two ranks does;
context parallelism costs it on more ranks what it does on two; the gradients' reduction hides behind the last micro batch's
work; links of the network reach the share of their datasheet that NVLink does; where a context-parallel group straddles NVLink
domains, all send all their bytes over the network. Pipeline stages are not interleaved, and the slowest sets the pace of all.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from megatron_lighthouse.lighthouse.geometry import Geometry
from megatron_lighthouse.mcore.command_line import graphs
from megatron_lighthouse.plan import work
from megatron_lighthouse.plan.coefficients import Coefficients
from megatron_lighthouse.plan.layer_time import Parts, Setup, dense_layer, lighthouse_layer
from megatron_lighthouse.plan.run import Run
from megatron_lighthouse.variants import DENSE, LIGHTHOUSE

OPTIMIZER_BYTES = 30
"""Read gradient, master and moments (16), write master, moments and bf16 parameter (14), of each parameter a rank updates."""
HOST_AGAIN = {"none": 0.0, "mlp": 0.25, "full": 0.5}
"""Share of a layer's host time that recomputing repeats. Assumed: half of it is the forward, and half of that the MLP's."""


def step_parts(run: Run, speed: Coefficients) -> Parts:
    """Seconds of one optimizer step by part, of the slowest pipeline stage. Their sum is the step.

    'host, exposed' is what the GPU waits for the host in all of them; `speed.without_host()` gives the step without it.
    """
    model, device, tp, cp, pp = run.model, run.device, run.tensor_parallel, run.context_parallel, run.pipeline_parallel
    layers, tokens = model.layers / pp, run.tokens
    full, mlp = run.recompute == "full", run.recompute == "mlp"
    share_of_mlp = 3 * model.hidden * model.ffn / run.layer_matrices
    # a forward, a backward of twice its work, and what is done again
    passes = 3 + full + (mlp + bool(run.mlp_tile_tokens)) * share_of_mlp
    linear = tokens * 2.0 * run.layer_matrices / tp / device.flops * speed.linear * passes
    moved = tokens * work.elementwise_bytes(model, run.rotated_columns) / tp / device.memory_bytes_s * speed.copy
    tensor, between, gradients = link_bytes(run)
    every = {
        "linear layers": linear,
        "elementwise": moved * speed.elementwise * (3 + full),
        "tensor parallel, exposed": tensor / layers * speed.link / device.link_bytes_s(run.spans["tensor parallel"]),
    }
    output = 2.0 * model.hidden * run.vocab_rank / device.flops * speed.linear * 3
    tiles = -(-tokens // run.logits_at_once)
    sums = 10 * model.hidden * (tiles if tiles > 1 else 0)  # fp32 sums read and written, and a tile's bf16 gradient read
    logits = tokens * output + (20 * tokens + sums) * run.vocab_rank / device.memory_bytes_s * speed.copy
    hosts = layer_host_seconds(run, speed)
    ends = _lighthouse_parts(run, run.edge, speed) if run.edge else _dense_parts(run, speed)
    kinds = ends, _lighthouse_parts(run, run.geometry, speed) if run.lighthouse_layers else {}

    def micro_batch(stage: int) -> Parts:
        """Seconds that a pipeline stage takes for one, by part. The last has the logits too."""
        found = {name: layers * value for name, value in every.items()}
        found["logits and loss"] = logits if stage == pp - 1 else 0.0
        waits = 0.0
        for count, own, host in zip(run.stages[stage], kinds, hosts, strict=True):
            if count:
                for name, value in own.items():
                    found[name] = found.get(name, 0.0) + count * value
                waits += count * max(0.0, host - sum(every.values()) - sum(own.values()))
        return found | {"host, exposed": waits}

    parts = max(map(micro_batch, range(pp)), key=lambda found: sum(found.values()))
    parts["pipeline, exposed"] = between * speed.link / device.link_bytes_s(run.spans["pipeline"])
    micro = sum(parts.values())
    parts = {name: value * run.micro_batches for name, value in parts.items()}
    parts["pipeline bubble"] = micro * (pp - 1)
    reduce = gradients * speed.link / device.link_bytes_s(run.spans["data parallel"])
    parts["data parallel, exposed"] = max(0.0, reduce - micro)
    share = rank_parameters(run) / (run.data_parallel * cp)
    parts["optimizer"] = share * OPTIMIZER_BYTES / device.memory_bytes_s * speed.copy
    return parts


def setup_of(run: Run, speed: Coefficients) -> Setup:
    """On what the attention of a run's layers takes its time."""
    return Setup(
        run.layer,
        run.device,
        speed,
        ranks=run.context_parallel,
        scheme=run.cp_comm_type,
        span=run.spans["context parallel"],
        base=run.base,
        around=run.around,
        past_alone=getattr(run.config, "causal_selection", False),
    )


def _dense_parts(run: Run, speed: Coefficients) -> Parts:
    """Seconds of the attention of a dense layer for a micro batch, by part of the step."""
    full, attended = run.recompute == "full", run.documents.row(run.seq_length).attended if run.documents else None
    layer = dense_layer(run.seq_length, setup_of(run, speed), attended)
    exposed = layer["exposed"] + full * layer["exposed fwd"]
    return {"dense attention": layer["fwd+bwd"] + full * layer["fwd"] - exposed, "context parallel, exposed": exposed}


def _lighthouse_parts(run: Run, geometry: Geometry, speed: Coefficients) -> Parts:
    """As `_dense_parts`, of a Lighthouse layer."""
    full = run.recompute == "full"
    layer = lighthouse_layer(geometry, setup_of(run, speed), run.config.scorer)
    parts = {}
    for name in ("score", "select", "gather", "scatter"):
        again = full + (run.discard_output and name == "scatter")
        parts[name] = layer[name] * (1 + again) + layer.get(f"{name} bwd", 0.0)
    parts["inner attention"] = layer["inner"] + full * layer["inner fwd"]
    return {**parts, "context parallel, exposed": layer["exposed"] + full * layer["exposed fwd"]}


def layer_host_seconds(run: Run, speed: Coefficients) -> tuple[float, float]:
    """What the device's host takes to start one layer's work, forward, backward and what is done again.

    Returns:
        Of the first and last layers, as `Run.stages` counts them, and of the Lighthouse layers between; 0 under CUDA graphs.
    """
    if graphs.kind_of(Namespace(**run.options)) != "none":
        return 0.0, 0.0
    seconds = partial(speed.layer_host_seconds, run.device.host)
    scheme = run.cp_comm_type if run.context_parallel > 1 else ""
    tensor = seconds(DENSE.name, "p2p") - seconds(DENSE.name, "") if run.tensor_parallel > 1 else 0.0
    ends, own = (
        (seconds(kind, scheme) + tensor) * (1 + HOST_AGAIN[run.recompute])
        for kind in (LIGHTHOUSE.name if run.edge else DENSE.name, LIGHTHOUSE.name)
    )
    return ends, own


def host_seconds(run: Run, speed: Coefficients) -> float:
    """What that host takes in a step for the layers of a rank that has most: the step is never shorter."""
    hosts = layer_host_seconds(run, speed)
    return run.micro_batches * max(sum(n * host for n, host in zip(stage, hosts, strict=True)) for stage in run.stages)


def link_bytes(run: Run) -> tuple[float, float, float]:
    """Bytes that a rank sends, by tensor and by pipeline parallelism in a micro batch, and by data parallelism in a step.

    Tensor: with sequence parallelism a layer gathers and scatters its input twice forward; backward once more gathers each.
    Data: gradients scattered and bf16 parameters gathered, over data- and context-parallel ranks (ring).
    """
    tp, pp, dp = run.tensor_parallel, run.pipeline_parallel, run.data_parallel * run.context_parallel
    activation = run.tokens * run.model.hidden * 2.0
    calls = 10 + 4 * (run.recompute == "full") + 2 * (run.recompute == "mlp")
    tensor = run.model.layers / pp * calls * activation * (tp - 1) / tp
    between = 2 * activation / tp if pp > 1 else 0.0
    return tensor, between, rank_parameters(run) * (run.gradient_bytes + 2) * (dp - 1) / dp


def rank_parameters(run: Run) -> float:
    """Parameters on a rank of the last pipeline stage, which has most."""
    return stage_parameters(run, run.pipeline_parallel - 1)


def stage_parameters(run: Run, stage: int) -> float:
    """Parameters on a rank of a pipeline stage, from 0: its layers; the first's embedding; the last's norm and output.

    Where these are tied, a stage that is both has them once, and of several stages the first and the last have one each.
    """
    model, tp, pp = run.model, run.tensor_parallel, run.pipeline_parallel
    layers = model.layers / pp * (run.layer_matrices / tp + 2 * model.hidden)
    first, last = stage == 0, stage == pp - 1
    vocabularies = max(first, last) if model.tied else first + last
    return layers + last * model.hidden + vocabularies * run.vocab_rank * model.hidden


def tokens_per_gpu(run: Run, speed: Coefficients) -> float:
    """Tokens a second and GPU."""
    return run.seq_length * run.global_batch / sum(step_parts(run, speed).values()) / run.gpus
