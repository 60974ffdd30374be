"""SwiGLU experts whose matrices are chains of cores, of which all experts share the central one."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_pretrain.huggingface.remote_code.common import empty, gated


class Experts(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_out``; a matrix is built of its cores when an expert is used."""

    def __init__(self, config: Any):
        super().__init__()
        self.shapes = config.core_shapes
        self.numbers = config.activation
        for name, shapes in self.shapes.items():
            for index, shape in enumerate(shapes):
                is_shared = index == len(shapes) // 2
                leading = () if is_shared else (config.num_networks,)
                place = "shared" if is_shared else f"core_{index}"
                self.register_parameter(f"{name}_{place}", empty(*leading, *shape))

    def matrix(self, name: str, expert: int) -> Tensor:
        """The matrix ``gate``, ``up`` or ``out`` of one expert."""
        centre = len(self.shapes[name]) // 2
        places = ["shared" if index == centre else f"core_{index}" for index in range(len(self.shapes[name]))]
        cores = [self.get_parameter(f"{name}_{place}") for place in places]
        product = None
        for index, core in enumerate(cores):
            # A core is [bond before, rows, columns, bond behind], each expert's own but for the central one.
            own = core if index == centre else core[expert]
            if product is None:
                product = own[0]
            else:
                grown = torch.einsum("ijb,bkld->ikjld", product, own)
                product = grown.flatten(0, 1).flatten(1, 2)
        assert product is not None
        return product[:, :, 0]

    def run(self, hidden: Tensor, expert: int, router: Any) -> Tensor:
        """Output of one expert."""
        gate, up, out = (self.matrix(name, expert) for name in ("gate", "up", "out"))
        inner = gated(nn.functional.linear(hidden, gate), nn.functional.linear(hidden, up), self.numbers)
        return nn.functional.linear(inner, out)
