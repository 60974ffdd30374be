"""Checks before wandb starts: a key, a server that answers, an earlier run.

Nothing here prompts, or imports wandb.
"""

import netrc
import os
import threading
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from moe_pretrain.system.files import write_whole

_REACH_SECONDS = 5.0
_STRICTNESS = ("auto", "online", "offline", "off")
# What wandb itself takes; the last two of each are its old words.
_MODES = {"online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline"}
_MODES |= {"disabled": "off"}


def stricter(asked: str, settings_mode: str | None = None) -> tuple[str, str]:
    """Obey whoever sends less: ``metrics.wandb``, or wandb's own settings and environment.

    Args:
        asked: "auto", "online", "offline" or "off".
        settings_mode: The mode in wandb's settings, which its own commands write to files; None while not known.

    Returns:
        What is to be done, in the words of ``asked``, and where it comes from if it is not what was asked.

    Raises:
        ValueError: ``WANDB_MODE`` is none of wandb's words.
    """
    said = os.environ.get("WANDB_MODE", "").strip().lower()
    if said and said not in _MODES:
        raise ValueError(f"WANDB_MODE={said} in the environment must be one of {', '.join(_MODES)}")
    found = [("", asked), (f"WANDB_MODE={said}", _MODES.get(said, "auto"))]
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on"):
        found.append(("WANDB_DISABLED in the environment", "off"))
    found.append((f"mode={settings_mode} in wandb's settings", _MODES.get(settings_mode or "", "auto")))
    where, mode = max(found, key=lambda one: _STRICTNESS.index(one[1]))
    return (asked, "") if mode in ("auto", "online") else (mode, where)


def keep_wandb_inside(folder: Path) -> None:
    """Put the folders that wandb would make in the user's home below the run, where that is not said otherwise.

    Its configuration stays where the user has one: it says which server is theirs.
    """
    for name in ("CACHE", "DATA", "ARTIFACT"):
        os.environ.setdefault(f"WANDB_{name}_DIR", str((folder / "wandb" / name.lower()).resolve()))
    configuration = Path("~/.config/wandb").expanduser()
    nearest = next(path for path in (configuration, *configuration.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        os.environ.setdefault("WANDB_CONFIG_DIR", str((folder / "wandb" / "config").resolve()))


def choose_mode(asked: str, reason: str, logged_in: bool, base_url: str) -> tuple[str, str]:
    """Decide between online and offline without asking anybody.

    Args:
        asked: "auto", "online" or "offline".
        reason: Who asked, if it was not the run's configuration.
        logged_in: Whether there is a key.
        base_url: The wandb server.

    Returns:
        The mode, and for "offline" the reason.

    Raises:
        ValueError: "online" was asked for and nobody is logged in.
    """
    if asked == "offline":
        return "offline", reason or "as configured"
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
    """Id that a run folder has at wandb, kept over resumes; the first call makes it up, and so does one in a copy.

    The file's second line is the folder that the id is of: where another folder has it, this one is its copy, and rows
    of both would end in one run at wandb. A folder that was moved takes its id along.
    """
    here = str(path.parent.resolve())
    known, folder = ((path.read_text(encoding="utf-8").splitlines() if path.exists() else []) + ["", ""])[:2]
    original = Path(folder) / path.name
    is_copy = folder not in ("", here) and original.is_file() and not original.samefile(path)
    if is_copy and original.read_text(encoding="utf-8").splitlines()[:1] == [known]:
        known = ""
    name = known or uuid.uuid4().hex[:8]
    if (name, here) != (known, folder):
        write_whole(path, f"{name}\n{here}\n")
    return name
