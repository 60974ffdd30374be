#!/usr/bin/env bash
# What every change must pass: format, lint, types, every test.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment "[dev]"
ruff format --check . || fail "ruff format: run 'ruff format .'"
ruff check . || fail "ruff check"
mypy || fail "mypy"
exec bash scripts/test.sh --all "$@"
