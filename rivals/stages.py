"""Rivals: the trainings that make the toy's rivals; rivals/lab.py gives them to train.py."""

from programs.trainer import Stage
from rivals.lama_training import lama_task
from rivals.paint_by_example_training import paint_by_example_task

RIVAL_STAGES = {
    "lama": Stage(lama_task, dict(lr=1e-3, batch=8, steps=2400, size=128, ema=0.0, warmup=50, decay=0.3)),
    "paint-by-example": Stage(paint_by_example_task, dict(
        lr=1e-3, batch=16, steps=2600, size=128, ema=0.99, warmup=50, decay=0.3, clip_gradient=1.0, noise_offset=0.1,
        weighting="debias", prompt_dropout=0.2)),
}
