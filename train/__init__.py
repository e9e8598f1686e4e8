"""The run: recipe, model, layouts, training step, checkpoints, records; main.py starts it."""

from train import lazy_imports, old_names

lazy_imports.install()
old_names.install()
