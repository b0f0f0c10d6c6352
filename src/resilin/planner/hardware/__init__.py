"""What a plan knows of machines: devices, links, disks, prices, power and failures, as small TOML files."""

from resilin.planner.hardware.cluster import Cluster, Device, Efficiency, Level
from resilin.planner.hardware.find import known_machines, load_cluster

__all__ = ["Cluster", "Device", "Efficiency", "Level", "known_machines", "load_cluster"]
