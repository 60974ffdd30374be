"""Map of a run's folder: the name of every file in it, each defined here once."""

JOB_FILE = "job.json"
STATE_FILE = "job_state.json"
JOB_LOCK = ".job.lock"
LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"

SPECIALISATION_FILE = "specialisation.json"

RUN_FILES = {"config.yaml", "metrics.jsonl", "overrides.txt"}
"""A folder with any of these is a run: one that broke before its first step must not vanish from the comparison."""

CERTIFICATE = "certificate.json"
"""A run folder's certificate: ``{"code": ..., "rows": [{"property", "verdict", "detail"}]}``."""

REWINDS_FILE = "rewinds.json"

SICK_STEPS = "sick_steps"

OWNER_FILE = "owner.lock"

PROBES = "probe"

STACKS = "stacks"

OVERRIDES_FILE = "overrides.txt"

CHECKPOINTS = "checkpoints"
