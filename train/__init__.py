"""The run: recipe, model, layouts, training step, checkpoints, records; main.py starts it."""

from train import old_names

old_names.install()
