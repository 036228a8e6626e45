"""Many engines as Ray actors. Nothing outside this folder imports Ray."""

import os

# Ray prints what its daemons say about dead workers on the driver's standard output, over the run's
# own lines, unless this says otherwise; it is read when Ray is imported.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
