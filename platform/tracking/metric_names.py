"""How MLflow's pages name the metrics of a run.

A page of charts has a section for what is before a metric's last slash, in alphabetical order and with those without a
slash at the end, and calls a chart what is behind it: of `samples/s` that is "s". So what MLflow gets has another name
than in the run's own files where that would be cut, or would stand before the loss.
"""

_SHOWN = {
    "loss": "loss/total",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "samples/s": "speed/samples_per_s",
    "tokens/s/device": "speed/device_tokens_per_s",
    "mfu": "speed/mfu",
    "rank_balance": "speed/rank_balance",
    "step_seconds": "speed/step_seconds",
    "data_wait_fraction": "speed/data_wait_fraction",
    "checkpoint_stall_seconds": "speed/checkpoint_stall_s",
    "dropped_steps": "problems/dropped_steps",
    "failed_checkpoints": "problems/failed_checkpoints",
    "cut_captions": "problems/cut_captions",
    "gpu_hours/used": "used_device_hours/total",
}
_SECTIONS = {"gpu_hours/": "used_device_hours/", "evaluation/": "quality/"}
_KNOWN = {there: here for here, there in _SHOWN.items()}


def shown(name: str) -> str:
    """A metric's name in MLflow."""
    if name in _SHOWN:
        return _SHOWN[name]
    return next((there + name.removeprefix(here) for here, there in _SECTIONS.items() if name.startswith(here)), name)


def known(name: str) -> str:
    """A metric of MLflow's by the name that it has in the run's files; runs until November 2026 have no other."""
    if name in _KNOWN:
        return _KNOWN[name]
    return next((here + name.removeprefix(there) for here, there in _SECTIONS.items() if name.startswith(there)), name)
