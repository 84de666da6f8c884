"""The devices: datasheet numbers. Nothing here is measured; what a device reaches of them is `calibration`'s to say."""

from __future__ import annotations

from dataclasses import dataclass

HELD_BACK = 0.05
"""Share of a GPU's memory left to the CUDA context, NCCL and fragmentation: an H100 trained with 75.8 of its 80 GiB."""


@dataclass(frozen=True)
class Device:
    """One GPU and what connects it."""

    name: str
    flops: float
    """Dense bf16, FLOP/s."""
    memory_bytes_s: float
    """HBM, bytes/s."""
    memory_gib: float
    """HBM, GiB: the datasheet's GB, which nvidia-smi shows as about as many GiB."""
    nvlink_bytes_s: float
    """To the GPUs of its NVLink domain, each way."""
    network_bytes_s: float
    """To all others, each way."""
    domain: int
    """GPUs in an NVLink domain."""
    node: int
    """GPUs of a host: what a job takes of a domain is whole hosts."""
    multiprocessors: int
    source: str
    measured: bool = False
    """Whether calibration points come from this device; all others are extrapolated by datasheet ratios."""
    host: str = "the slow host of the H100 points"
    """Whose time a run waits for: of the machines whose hosts were measured."""

    @property
    def usable_bytes(self) -> float:
        """Bytes that a run may allocate."""
        return self.memory_gib * 2**30 * (1 - HELD_BACK)

    def holds(self, gpus: int) -> bool:
        """Whether every group of `gpus` neighbours, counted from the first GPU, lies in one NVLink domain.

        So it is where such groups fill a domain, or where they fill hosts and the job takes so many of each domain (SEGMENT).
        """
        return self.domain % gpus == 0 or (gpus < self.domain and gpus % self.node == 0)

    def link_bytes_s(self, gpus: int) -> float:
        """Bytes/s each way within groups of ranks that span `gpus` neighbours: NVLink where no group straddles domains."""
        return self.nvlink_bytes_s if self.holds(gpus) else self.network_bytes_s


H200 = "the hosts of H200s on 30 November"
"""A `Device.host`."""
DEVICES = {
    "h100": Device("H100 SXM 80GB", 989e12, 3.35e12, 80, 450e9, 50e9, 8, 8, 132, "NVIDIA H100 and DGX H100 datasheets", True),
    "h200": Device(
        "H200 SXM 141GB", 989e12, 4.8e12, 141, 450e9, 50e9, 8, 8, 132, "NVIDIA H200 and DGX H200 datasheets", host=H200
    ),
    "b200": Device("HGX B200 180GB", 2250e12, 8e12, 180, 900e9, 50e9, 8, 8, 148, "NVIDIA DGX B200 datasheet, an eighth of it"),
    "gb200": Device("GB200 186GB", 2500e12, 8e12, 186, 900e9, 50e9, 72, 4, 148, "NVIDIA GB200 NVL72 datasheet, a 72nd of it"),
}


def device_of(name: str) -> Device:
    """By its name, in capitals or not. Raises ValueError where that is not known."""
    if name.lower() not in DEVICES:
        raise ValueError(f"--device {name!r} is not known: use {' or '.join(DEVICES)}.")
    return DEVICES[name.lower()]
