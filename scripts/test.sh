#!/usr/bin/env bash
# Fresh machine to test results: makes the environment, then runs every test that needs no GPU.
# Arguments go to pytest: bash scripts/test.sh tests/unit -k router
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment "[dev]"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Whole files each: files share the runs that they make. One more than two cores carry, for some tests mostly wait; long
# ones come first, in the order of tests/conftest.py.
exec python -m pytest -m "not gpu and not slow" -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
