"""What 1 to 64 GPUs can be expected to do: the tables of docs/scaling.md, worked out from the inputs named here.

    python tests/benchmarks/expect_scaling.py

MEASURED inputs come from this folder's other benchmarks and name them; DERIVED ones are arithmetic on the network;
NOMINAL ones are what makers state. Nothing here was measured on several GPUs.
"""

from __future__ import annotations

GRADIENT_BYTES = 24_436_369 * 4  # DERIVED: parameters, float32
COLLECTIVES = 2 * 46  # DERIVED: batch-norm layers, one forward and one backward each
COMPUTE = {256: 5_090, 512: 1_272}  # DERIVED: images/s of one H200 at 30 % of 790 TFLOP/s bf16
LAUNCH_S = 4e-3  # DERIVED: 620 operations a step at 5 to 8 us each; with CUDA graphs next to nothing
NETWORKS = {  # NOMINAL: bytes/s of a ring's slowest link, and the latency of a small collective
    "1 node": (300e9, 20e-6),
    "400 Gbit/s a node": (40e9, 50e-6),
    "25 Gbit/s a node": (3e9, 100e-6),
}
LOADER = {256: 15_790, 512: 6_793}  # MEASURED: augmented pairs/s of one thread (bench_reading), on one AVX2 core
ORDER_S = 0.23e-6  # MEASURED: seconds a case to order an epoch and divide it, on each rank
CATALOG_S = 19e-6  # MEASURED: seconds a case to read a catalog of 50,000 cases, a fifth of them with masks


def step_s(size_px: int, gpus: int, batch: int, network: str, *, graphs: bool, sync_batch_norm: bool = True) -> float:
    """Seconds of a step: the part of the rank that has most, launching, and what the ranks exchange, nothing hidden."""
    compute = max(-(-batch // gpus) / COMPUTE[size_px], 0 if graphs else LAUNCH_S)
    if gpus == 1:
        return compute
    rate, latency = NETWORKS[network]
    inside, _ = NETWORKS["1 node"]
    exchanged = 2 * (gpus - 1) / gpus * GRADIENT_BYTES / (inside if gpus <= 8 else rate)
    return compute + exchanged + (COLLECTIVES * latency if sync_batch_norm else 0)


def gpu_table() -> str:
    """Images/s at 256 pixels by number of GPUs, for the recipe's batch and for one that grows with the GPUs."""
    lines = [
        "| GPUs | batch | between nodes | images/s, 256 pixels | with CUDA graphs | and without sync. batch norm | "
        "of linear |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [(1, 64, "1 node"), (8, 64, "1 node"), (64, 64, "400 Gbit/s a node"), (64, 64, "25 Gbit/s a node")]
    cases += [(8, 512, "1 node"), (64, 4096, "400 Gbit/s a node"), (64, 4096, "25 Gbit/s a node")]
    for gpus, batch, network in cases:
        ways = ({"graphs": False}, {"graphs": True}, {"graphs": True, "sync_batch_norm": False})
        rates = [batch / step_s(256, gpus, batch, network, **way) for way in ways]
        share = rates[-1] / (gpus * COMPUTE[256])
        shown = " | ".join(f"{rate:,.0f}" for rate in rates)
        lines.append(f"| {gpus} | {batch} | {network if gpus > 8 else '-'} | {shown} | {share:.0%} |")
    return "\n".join(lines)


def input_table() -> str:
    """What one loader thread gives, and how much of it one GPU takes."""
    lines = ["| size | one thread, augmented | one GPU at 30 % MFU | share |", "|---|---|---|---|"]
    for size, rate in LOADER.items():
        lines.append(f"| {size} pixels | {rate:,} pairs/s | {COMPUTE[size]:,} images/s | {COMPUTE[size] / rate:.0%} |")
    return "\n".join(lines)


def data_table() -> str:
    """What a number of images takes, at 256 pixels."""
    lines = [
        "| images | store 256 pixels | 512 pixels | epoch, 1 GPU | 8 GPUs | 64 GPUs | epoch order | catalog read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for images in (10**4, 10**5, 10**6, 10**7):
        sizes = (f"{2 * images * side**2 / 1e9:,.1f} GB" for side in (256, 512))
        times = (f"{images / (gpus * COMPUTE[256]):,.1f} s" for gpus in (1, 8, 64))
        own = (f"{images * each:,.2f} s" for each in (ORDER_S, CATALOG_S))
        lines.append(f"| {images:,} | " + " | ".join((*sizes, *times, *own)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(gpu_table(), input_table(), data_table(), sep="\n\n")
