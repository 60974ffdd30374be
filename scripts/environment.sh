# Makes the repository's environment in .venv and activates it. Sourced by the other scripts, from any folder.
# Quick when nothing changed: a stamp of pyproject.toml says what was installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found; set PYTHON to one"
}

# Runs a command quietly; shows what it printed only if it fails.
quietly() {
    local what=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        rm -f "$log"
        fail "$what failed; its last lines are above"
    fi
    rm -f "$log"
}

environment() { # extras, for example "" or "[dev]"
    local extras=$1 stamp python
    stamp="$(cksum <pyproject.toml) ${extras} $(pwd)"
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
        python=$(find_python)
        echo "making .venv with $("$python" --version)"
        rm -rf .venv
        quietly "python -m venv .venv" "$python" -m venv .venv
    fi
    # The environment of the tests holds that of a run, so it is never taken away again.
    if ! grep -qxF -e "$stamp" .venv/installed 2>/dev/null; then
        echo "installing moe_pretrain${extras} into .venv (a few minutes the first time)"
        quietly "pip install" .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras}"
        echo "$stamp" >>.venv/installed
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
}
