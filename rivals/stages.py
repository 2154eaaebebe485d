"""Rivals: the stages of train.py that make the toy's rivals; their settings."""

from rivals.lama_training import LAMA_SETTINGS, lama_task
from rivals.paint_by_example_training import PAINT_BY_EXAMPLE_SETTINGS, paint_by_example_task

RIVAL_STAGES = {"lama": lama_task, "paint-by-example": paint_by_example_task}
RIVAL_SETTINGS = {"lama": LAMA_SETTINGS, "paint-by-example": PAINT_BY_EXAMPLE_SETTINGS}
