"""With which status a run ends, for launchers and supervisors to act on."""

import os

USAGE_STATUS = 2
"""A mistake in the recipe: the same command would fail again."""
PREEMPTED_STATUS = os.EX_TEMPFAIL
"""75, after SIGTERM: everything is saved, the same command goes on from here."""
HANG_STATUS = 76
"""A rank ended a hang: the same command goes on from the newest checkpoint."""
REPLAY_STATUS = 77
"""The last steps are to be trained again, from the newest checkpoint: a gradient was not finite."""
UNFIT_STATUS = 78
"""Preflight found a machine unfit: no step was trained."""
INTERRUPTED_STATUS = 130
"""After Ctrl-C, as shells have it."""
