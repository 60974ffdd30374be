"""Memory of a CPU run. Nothing of ours is imported here, so benchmarks and training share it."""

import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: page faults on fresh tensors cost a CPU run up to half its time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library; only speed is lost
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 1 << 26)
