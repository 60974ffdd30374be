"""What must be known before wandb starts: is there a key, a server that answers, an earlier run.

Nothing here prompts, or imports wandb.
"""

import netrc
import threading
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from moe_pretrain.system.files import write_whole

_REACH_SECONDS = 5.0


def choose_mode(asked: str, logged_in: bool, base_url: str) -> tuple[str, str]:
    """Decide between online and offline without asking anybody.

    Args:
        asked: "auto", "online" or "offline".
        logged_in: Whether there is a key.
        base_url: The wandb server.

    Returns:
        The mode, and for "offline" the reason.

    Raises:
        ValueError: "online" was asked for and nobody is logged in.
    """
    if asked == "offline":
        return "offline", "as configured"
    if not logged_in:
        if asked == "online":
            raise ValueError("metrics.wandb=online needs a wandb login: run `wandb login`, or set it to offline")
        return "offline", "not logged in"
    if not reachable(base_url):
        return "offline", f"no answer from {base_url}"
    return "online", ""


def netrc_key(base_url: str) -> str | None:
    """Return the password that ``~/.netrc`` holds for a server (`wandb login` writes it there)."""
    try:
        entry = netrc.netrc().authenticators(urlsplit(base_url).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] if entry else None


def reachable(url: str) -> bool:
    """Say whether the server answers at all; the thread bounds a name look-up that hangs."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_REACH_SECONDS).close()
            answers.append(True)
        except urllib.error.HTTPError:  # any status is an answer
            answers.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_REACH_SECONDS)
    return bool(answers)


def run_id(path: Path) -> str:
    """Return the wandb id that a run folder keeps over its resumes; the first call makes it up."""
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()
