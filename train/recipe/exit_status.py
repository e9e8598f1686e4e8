"""Exit statuses of a run, for launchers and supervisors to act on."""

import os

USAGE_STATUS = 2
"""A mistake in the recipe: the same command would fail again."""
PREEMPTED_STATUS = os.EX_TEMPFAIL
"""75, after SIGTERM or, in training, Ctrl-C or the last batch before a phase with another layout: everything
is saved, the same command resumes from here."""
HANG_STATUS = 76
"""A rank detected a hang: the same command resumes from the newest checkpoint."""
REPLAY_STATUS = 77
"""A gradient was not finite: the same command retrains the last steps from the newest checkpoint."""
UNFIT_STATUS = 78
"""A machine is unfit: by preflight, before any step, or since a step recomputed gave other results."""
INTERRUPTED_STATUS = 130
"""After Ctrl-C where nothing is to be saved, as in shells."""
