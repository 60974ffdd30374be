#!/usr/bin/env bash
# Fresh machine to test results: makes the environment, then runs every test that needs no GPU.
# Arguments go to pytest: bash scripts/test.sh tests/unit -k router
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment "[dev]"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Two at a time, whole files each: most tests are one process, and files share the runs that they make.
exec python -m pytest -m "not gpu and not slow" -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
