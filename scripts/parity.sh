#!/usr/bin/env bash
# The whole parity product: every topology and way to take a step against the oracle. About half an hour on 2 cores.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment "[dev]"
export OMP_NUM_THREADS=1
exec python scripts/tables/parity.py "$@"
