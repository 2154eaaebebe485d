"""The stages of train.py that make the toy's rivals, and their settings."""

from rivals.lama_training import LAMA_SETTINGS, lama_task

RIVAL_STAGES = {"lama": lama_task}
RIVAL_SETTINGS = {"lama": LAMA_SETTINGS}
