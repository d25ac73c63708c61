"""DeepSpeed's configuration, derived from ours: there is no second file to keep in step. Known without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from domainshuttle.model.spec import ModelSpec
from domainshuttle.platform.config.schema import EngineSection, RunConfig, StageSection, Trained
from domainshuttle.platform.engine.model_size import model_size
from domainshuttle.platform.engine.trained_parameters import trained_of

LIVE_PARAMETERS = 1_000_000_000
"""Elements that may be gathered at once, at least: DeepSpeed's default."""
LEAST_BUCKET = 1_000_000
"""Elements of gradients that are summed over the ranks at once, at least; its buffer is made whole."""


@dataclass(frozen=True)
class BlockSize:
    """Elements of the largest block, which is what is gathered, prefetched and reduced at once."""

    elements: int
    trained: int

    @property
    def prefetch_bucket(self) -> int:
        """Elements that are gathered ahead: the next block, while one is computed."""
        return self.elements

    @property
    def reduce_bucket(self) -> int:
        """Elements of gradients that are summed over the ranks at once: a block's, as it is left."""
        return max(self.trained, LEAST_BUCKET)

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, int, bool]]) -> "BlockSize":
        """Of a model's parameters: name, elements, and whether each is trained."""
        blocks: dict[str, list[int]] = {}
        for name, size, trained in parameters:
            if name.startswith("blocks."):
                block = blocks.setdefault(name.split(".")[1], [0, 0])
                block[0] += size
                block[1] += size * trained
        return cls(*(max(sizes) for sizes in zip(*blocks.values(), strict=True)))

    @classmethod
    def planned(cls, spec: ModelSpec, trained: Trained) -> "BlockSize":
        """Of a model that is not built."""
        selected = trained_of(spec, trained)
        named = ((selected.trained, True), (selected.frozen, False))
        return cls.of((name, size, trained) for sizes, trained in named for name, size in sizes.items())


def deepspeed_config(
    stage: StageSection, engine: EngineSection, accumulation: int, on_gpu: bool, block: BlockSize
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a stage; `block` is that of the model which it trains."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": stage.gradient_clipping,
        # what is trained is float32 for DeepSpeed: the model's layers round it for their products (mixed_precision.py)
        "bf16": {"enabled": engine.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": stage.learning_rate,
                "betas": list(stage.betas),
                "weight_decay": stage.weight_decay,
                # torch's own: DeepSpeed's would be compiled on the spot, for which each node needs CUDA's compiler
                "torch_adam": True,
                "fused": on_gpu,
            },
        },
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": engine.persistent_parameters,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            # it would put its own product in the place of torch's in the whole process, which keeps every input; the
            # model's layers (mixed_precision.py) let gathered weights go as well
            "memory_efficient_linear": False,
            "stage3_prefetch_bucket_size": block.prefetch_bucket,
            "stage3_max_live_parameters": max(3 * block.elements, LIVE_PARAMETERS),
            "reduce_bucket_size": block.reduce_bucket,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if engine.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return config


def deepspeed_configs(config: RunConfig) -> dict[str, dict[str, Any]]:
    """DeepSpeed's configuration of every stage, as the engine derives it; of a range of workers, with the most."""
    on_gpu, configs = config.cluster.gpus_per_worker > 0, {}
    spec = model_size(config.model_of(config.experts[0] if config.experts else None))
    for stage in config.stages:
        accumulation = config.accumulation(stage, config.worker_sizes(stage)[-1])
        block = BlockSize.planned(spec, stage.trained)
        configs[stage.name] = deepspeed_config(stage, config.engine, accumulation, on_gpu, block)
    return configs
