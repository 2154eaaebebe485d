"""Rivals: the trainings that make the toy's rivals; rivals/lab.py gives them to train.py."""

from programs.trainer import Stage
from rivals.lama_training import LAMA_SETTINGS, lama_task
from rivals.paint_by_example_training import PAINT_BY_EXAMPLE_SETTINGS, paint_by_example_task

RIVAL_STAGES = {"lama": Stage(lama_task, LAMA_SETTINGS),
                "paint-by-example": Stage(paint_by_example_task, PAINT_BY_EXAMPLE_SETTINGS)}
