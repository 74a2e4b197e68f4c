"""torch.compile for the blocks of both towers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip.models.dual_encoder import DualEncoder
from declip.models.layers import blocks_of

MOST_GRAPHS = 64  # of one function: five lengths of texts, with and without gradient, both towers; torch allows 8


def compile_blocks(model: DualEncoder, backend: str = "inductor") -> int:
    """Compile the training passes of the blocks of both towers; return the number of blocks.

    Blocks of one kind share a graph, for any number of rows: a batch may lack broken pairs. Evaluation runs without it,
    and so do blocks with a batch norm that is synchronized over processes. Parameters keep their names. What cannot be
    compiled runs as it is, after torch's warning.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    torch._dynamo.config.suppress_errors = True
    blocks = [block for tower in (model.image_tower, model.text_tower) for block in blocks_of(tower)]
    local = [block for block in blocks if not any(map(_is_synchronized, block.modules()))]
    for block in local:
        _compile(block, backend)
    return len(local)


def _is_synchronized(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and "Sync" in type(module).__name__  # torch's, or `HostSyncBatchNorm`


def _compile(block: Any, backend: str) -> None:
    plain: Any = block.forward
    # The number of rows is marked as dynamic; all other sizes are constants, which makes faster kernels.
    compiled = torch.compile(plain, dynamic=False, backend=backend)

    def forward(x: Tensor, *args: Any, **options: Any) -> Any:
        if not block.training:
            return plain(x, *args, **options)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(x, *args, **options)

    # Not `block.compile`, which would compile the hooks of FSDP and of checkpointing too.
    block.forward = forward
