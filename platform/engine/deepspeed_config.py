"""DeepSpeed's configuration, derived from ours: there is no second file to keep in step. Known without torch."""

from typing import Any

from domainshuttle.platform.config.schema import EngineSection, RunConfig, StageSection


def deepspeed_config(stage: StageSection, engine: EngineSection, accumulation: int, on_gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a stage."""
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
            # of float32: half of DeepSpeed's default, as many bytes; the demo's gigabyte would never be filled
            "reduce_bucket_size": 250_000_000 if on_gpu else 1_000_000,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if not on_gpu:
        config["zero_optimization"]["stage3_prefetch_bucket_size"] = 1_000_000
    if engine.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return config


def deepspeed_configs(config: RunConfig) -> dict[str, dict[str, Any]]:
    """DeepSpeed's configuration of every stage, as the engine derives it; of a range of workers, with the most."""
    on_gpu, configs = config.cluster.gpus_per_worker > 0, {}
    for stage in config.stages:
        accumulation = stage.global_batch // (config.worker_sizes(stage)[-1] * stage.micro_batch)
        configs[stage.name] = deepspeed_config(stage, config.engine, accumulation, on_gpu)
    return configs
