"""Tools around a training run: plans, jobs, restarts, checks, verification and experiments."""

from train import old_names

old_names.install()
