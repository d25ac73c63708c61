"""Compilation of the blocks by torch.compile: for all lengths at once, and never in silence without it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from domainshuttle.platform.config.schema import ConfigError

MOST_GRAPHS = 64
"""Of one kind of block: no, one or several references, each with a mask and without, with gradients and without."""


def compile_blocks(model: Any, backend: Any) -> None:
    """Compiles what a transformer's blocks compute, of any frames, references and tokens.

    ZeRO-3's hooks, which gather the weights around a block, stay outside. What can't be compiled, or would be compiled
    more often than `MOST_GRAPHS` times, raises ConfigError when it is called: torch would go on without compilation,
    with other memory and time than was planned.
    """
    compiler: Any = torch.compile  # whose types don't name its limit
    for block in model.blocks:
        compiled = compiler(block.transform, backend=backend, fullgraph=True, dynamic=True, recompile_limit=MOST_GRAPHS)
        block.transform = functools.partial(_run, compiled, backend)


def _run(compiled: Callable[..., Tensor], backend: Any, *given: Any) -> Tensor:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        return compiled(*given)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        told = error.__cause__ if isinstance(error, FailOnRecompileLimitHit) else error
        reason = next((line.strip() for line in str(told).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"engine.compile={backend} can't compile the model's blocks: {reason}. Leave engine.compile out: the step "
            "is then computed by torch's own code"
        ) from error
