"""Which points of an MLflow run are steps of its training.

A run also has figures that are logged beside the training, on steps of their own: device-hours by the driver, after the
last step of a segment and by the number of the attempt in a schedule; system metrics, by sample; evaluations, also of
other programs. They say nothing about how far the training is.
"""

from collections.abc import Mapping

_TRAINING = ("loss", "learning_rate")
"""Each logged step has a learning rate. It has no loss where all steps since the one before were dropped."""


HOURS_TAG, OWN_HOURS = "gpu_hours.of", "stage"
"""A tag of a segment's run whose device-hours are its own. In runs until November 2026, which do not have it, they
count on over the schedule."""


def last_training_step(last_steps: Mapping[str, int]) -> int | None:
    """How many steps were trained, as far as they are logged, from the last step of each metric; None: no training."""
    return max((last_steps[name] for name in _TRAINING if name in last_steps), default=None)
