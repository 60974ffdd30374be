#!/usr/bin/env bash
# Fresh machine to a trained model: makes the environment, then trains the default model on built-in text.
# Arguments go through as overrides: bash scripts/quickstart.sh budget.tokens=1000000
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment ""
exec moe-pretrain train run.name=quickstart "$@"
