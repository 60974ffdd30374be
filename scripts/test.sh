#!/usr/bin/env bash
# Fresh machine to test results: makes the environment, then runs the tests that need no GPU: without those marked
# slow, whose kind the others have in fewer cases, or with --all, as the first word, every one.
# Other words go to pytest: bash scripts/test.sh tests/unit -k router
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment "[dev]"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Each worker and each process that a test starts would compile the package and the tests again: half of all collection.
unset PYTHONDONTWRITEBYTECODE
chosen="not gpu and not slow"
if [ "${1:-}" = --all ]; then
    chosen="not gpu"
    export CHECK_EVERY_CALL=1  # annotations of shapes: on all ranks of a test, and not only its first calls
    shift
fi
# Whole files each: files share the runs that they make. One more than two cores carry, for some tests mostly wait; long
# ones come first, in the order of tests/conftest.py.
exec python -m pytest -m "$chosen" -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
