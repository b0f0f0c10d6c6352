"""Models larger than one memory: experts' states on disk, in host memory and on the device."""

from resilin.memory.cache_policy import CachePolicy
from resilin.memory.capacity import CapacityPlan, MoESize, plan_capacity
from resilin.memory.expert_store import ExpertStore
from resilin.memory.host_cache import HostCache
from resilin.memory.settings import ExpertTiers, MemorySettings
from resilin.memory.tiered_experts import TieredExperts

__all__ = [
    "CachePolicy",
    "CapacityPlan",
    "ExpertStore",
    "ExpertTiers",
    "HostCache",
    "MemorySettings",
    "MoESize",
    "TieredExperts",
    "plan_capacity",
]
