"""Matrix products on the CPU whose bits depend on the numbers alone. Nothing of ours is imported here."""

import os

import torch


def fix_products() -> None:
    """From here on, equal operands give equal products in this process, wherever they lie in memory.

    Sums inside a product are cut by the number of threads, so there is one. By default, MKL's order of summation also
    depends on how the operands are aligned, and views of ZeRO's flat buffers are aligned otherwise on other topologies.
    MKL's strict conditional numerical reproducibility ends that at no measurable cost; it must be asked for before
    the first product. What ``MKL_CBWR`` already says wins: ``AVX2,STRICT`` gives the same bits on more kinds of processors.

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
    """Whether one product has the same bits at every alignment of an operand within a cache line."""
    generator = torch.Generator().manual_seed(0)
    rows, matrix = torch.randn(24, 100, generator=generator), torch.randn(64, 100, generator=generator)
    products = []
    for offset in range(16):
        shifted = torch.empty(matrix.numel() + 16)[offset : offset + matrix.numel()].view_as(matrix).copy_(matrix)
        products.append(rows @ shifted.t())
    return all(torch.equal(product, products[0]) for product in products)
