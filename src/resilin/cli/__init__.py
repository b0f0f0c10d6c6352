"""The commands, one file each; what they do lives in the packages below."""

import os

# Large tensors on CPUs in pages of 2 MiB where the system offers them; torch reads this at its first allocation. glibc
# maps what is larger than 32 MiB anew each time, such as the gradients of stacked experts: a step of 64 experts of
# 512 x 256 spent 18% of its time on pages of 4 KiB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
