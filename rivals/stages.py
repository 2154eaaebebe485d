"""Rivals: the stages of train.py that make the toy's rivals, and what counts products in pictures; their settings."""

from rivals.lama_training import LAMA_SETTINGS, lama_task
from rivals.paint_by_example_training import PAINT_BY_EXAMPLE_SETTINGS, paint_by_example_task
from rivals.segmenter import SEGMENTER_SETTINGS, segmenter_task

RIVAL_STAGES = {"lama": lama_task, "paint-by-example": paint_by_example_task, "segmenter": segmenter_task}
RIVAL_SETTINGS = {"lama": LAMA_SETTINGS, "paint-by-example": PAINT_BY_EXAMPLE_SETTINGS,
                  "segmenter": SEGMENTER_SETTINGS}
