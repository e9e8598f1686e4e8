"""Everything before, around and about a run: plans, jobs, checks, proofs, experiments."""

from train import old_names

old_names.install()
