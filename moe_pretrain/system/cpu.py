"""Memory of a CPU run. Nothing of ours is imported here, so benchmarks and training share it."""

import ctypes
import os

import torch
from torch import Tensor


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


def fix_products() -> None:
    """From here on, equal operands give equal products in this process, wherever they lie in memory.

    Sums inside a product are cut by the number of threads, so there is one. By default, MKL's order of summation also
    depends on how the operands are aligned, and views of ZeRO's flat buffers are aligned otherwise on other topologies.
    MKL's strict conditional numerical reproducibility ends that at no measurable cost; it must be asked for before
    the first product. What ``MKL_CBWR`` already says wins.

    Raises:
        RuntimeError: Alignment still has an effect: this torch has no MKL, or a product came before.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    if not _alignment_has_no_effect():
        raise RuntimeError(
            "engine.determinism=elastic needs matrix products that do not depend on alignment: a torch with MKL, "
            f"and MKL_CBWR={os.environ['MKL_CBWR']} in the environment from the start"
        )


def _alignment_has_no_effect() -> bool:
    """Whether small products, which show it most, have the same bits at every alignment within a cache line."""
    generator = torch.Generator().manual_seed(0)
    rows, matrix = (torch.randn(count, 20, generator=generator) for count in (3, 5))
    products = [_moved(rows, offset) @ _moved(matrix, 2 * offset).t() for offset in range(16)]
    return all(torch.equal(product, products[0]) for product in products)


def _moved(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` elements after an aligned address."""
    return torch.empty(tensor.numel() + offset)[offset:].view_as(tensor).copy_(tensor)
