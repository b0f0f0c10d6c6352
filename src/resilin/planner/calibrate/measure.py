"""A machine's description from measurements on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from resilin.planner.calibrate.blocks import fit, time_decoders
from resilin.planner.calibrate.compute import measure_compute
from resilin.planner.calibrate.disk import measure_disk
from resilin.planner.calibrate.links import measure_links
from resilin.planner.hardware import Cluster, Device, Efficiency, Level
from resilin.planner.hardware.cluster import Disk
from resilin.run import provenance

Tell = Callable[[str], None]


def calibrate(folder: Path, processes: int = 2, tell: Tell = print) -> Cluster:
    """Measures this machine: one core of its CPU is a device, or its GPU is; takes about a minute on two quiet cores.

    Args:
        folder: on the disk that checkpoints go to.
        processes: that exchange tensors.
        tell: receives a line for each measurement.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        computed = measure_compute(device)
        peak = computed.peak()
        tell("products: " + ", ".join(f"{name} {rate / 1e9:.1f} GFLOP/s" for name, rate in peak.items()))
        tell(f"memory: {computed.bandwidth / 1e9:.1f} GB/s; an operation {computed.launch * 1e6:.1f} us")
        timed = time_decoders(device)
    finally:
        torch.set_num_threads(threads)
    exchanged = measure_links(processes)
    bandwidth, latency = exchanged.line()
    tell(f"links: {processes} processes, {bandwidth / 1e9:.2f} GB/s each, {latency * 1e6:.0f} us a step")
    read, written = measure_disk(folder)
    tell(f"disk: {read / 1e9:.2f} GB/s read, {written / 1e9:.2f} GB/s written")
    bare = Cluster(
        name=f"{platform.node() or 'this machine'}, measured",
        sources=("measured by `resilin plan calibrate`",),
        device=Device(
            name=_name(device),
            memory=_memory(device),
            bandwidth=computed.bandwidth,
            peak=peak,
            launch=computed.launch,
        ),
        levels=(Level(name="loopback", bandwidth=bandwidth, latency=latency, shared=_shared(device)),),
        workers=_devices(device),
        efficiency=Efficiency(source="passes of small decoders, measured"),
        disk=Disk(read=read, write=written),
    )
    found = fit(timed, bare)
    shares = found.efficiency
    tell(
        f"a model's passes: {shares.products:.0%} of the products' peak, {shares.bandwidth:.0%} of the memory's rate, "
        f"{found.device.launch * 1e6:.0f} us an operation"
    )
    return found


def _shared(device: torch.device) -> bool:
    return device.type == "cpu" and hasattr(os, "memfd_create")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a core of {provenance.machine().get('cpu', 'the CPU')}"


def _devices(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / max(os.cpu_count() or 1, 1)
