"""A process outside of a rank, which ends the rank when its interpreter stands still.

A long call of C code that keeps the interpreter's lock (a foreign function, one operation on a huge integer) stops all
threads of Python, those that watch the loop among them. Only another process sees that, and only C code can then end
the rank with an exit code of ours. A rank that was stopped (SIGSTOP) says nothing either, but is let go on.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from moe_pretrain.system.child_process import die_with, signal_main_thread, start_helper

_POLL_SECONDS = 1.0
_STACK_SECONDS = 1.0
"""How long the rank may take to write its stacks."""
_END_SECONDS = 5.0
"""How long it may take to end by itself before it is killed."""
_OF_TORCH = "/torch/"


@dataclass(frozen=True)
class Watched:
    """Facts of the rank that the process outside is told at its start.

    Attributes:
        name: The rank, in the words of the line that is printed.
        limit_polls: How many polls of a second may pass without a sign of life.
        start_polls: The same until it has come to its first place.
        stack_signal: Signal at which C code writes the stacks of its threads.
        stacks: File that they are written to.
        code: Exit code that it is to end with.
    """

    name: str
    limit_polls: int
    start_polls: int
    stack_signal: int
    stacks: Path
    code: int

    def words(self) -> list[str]:
        """Its values as words of a command line."""
        polls = [str(number) for number in (self.limit_polls, self.start_polls, int(self.stack_signal))]
        return [self.name, *polls, str(self.stacks), str(self.code)]

    @classmethod
    def of_words(cls, words: list[str]) -> "Watched":
        """Its values from the words of a command line."""
        name, limit, start, number, stacks, code = words
        return cls(name, int(limit), int(start), int(number), Path(stacks), int(code))


class OutsideWatch:
    """This process's end of it: ``tell`` is a sign of life."""

    def __init__(self, watched: Watched):
        """Start the process.

        Raises:
            ValueError: The system gives no further process.
        """
        signs, self._signs = os.pipe()
        self._end, told = os.pipe()
        os.set_blocking(self._signs, False)
        self._told = told  # kept open: an end of file is no order to end
        _exit_when_told(self._end, watched.code)
        try:
            words = [str(os.getpid()), str(signs), str(told), *watched.words()]
            self._process = start_helper(__name__, words, [signs, told])
        except OSError as error:
            raise ValueError(
                f"no process can be started to watch this one ({error.strerror}): raise the job's limit of memory or "
                "of processes (ulimit -u)"
            ) from None
        finally:
            os.close(signs)

    def tell(self, place: str = "") -> None:
        """Give a sign of life, and say where this rank has come to; nothing said is where it was."""
        with contextlib.suppress(OSError):  # a full pipe, or the process is gone
            os.write(self._signs, f"{place}\n".encode())

    def close(self) -> None:
        """End the process outside."""
        self._process.kill()
        self._process.wait()
        os.close(self._signs)


class _SignalEvent(ctypes.Structure):
    """``struct sigevent`` of 64-bit Linux."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_byte * 40),
    ]


class _ControlBlock(ctypes.Structure):
    """``struct aiocb`` of 64-bit Linux, whose last fields are the library's own."""

    _fields_ = [
        ("file", ctypes.c_int),
        ("operation", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("event", _SignalEvent),
        ("rest", ctypes.c_byte * 256),
    ]


_IN_A_THREAD = 2
"""SIGEV_THREAD."""


def _exit_when_told(file: int, code: int) -> None:
    """Have the C library end this process with ``code`` when a byte comes through ``file``, without the interpreter.

    It is POSIX's asynchronous read, whose end calls a function in a thread of C: ``_exit``. Where there is no such
    thing the process is killed instead, some seconds later.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "aio_read"):
        return
    buffer = ctypes.create_string_buffer(1)
    block = _ControlBlock(file=file, buffer=ctypes.addressof(buffer), length=1)
    block.event.value, block.event.notify = code, _IN_A_THREAD
    block.event.function = ctypes.cast(library._exit, ctypes.c_void_p).value
    for kept in (block, buffer):  # the library reads and writes them for as long as this process lives
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    library.aio_read(ctypes.byref(block))


def main() -> None:
    """Watch the parent until it ends, in a process of its own."""
    parent, signs, told = (int(word) for word in sys.argv[1:4])
    die_with(parent)
    watched = Watched.of_words(sys.argv[4:])
    os.set_blocking(signs, False)
    place, still = "", 0
    # Polls are counted and not seconds: after the whole job was paused, nobody is accused.
    while still < (watched.limit_polls if place else watched.start_polls):
        time.sleep(_POLL_SECONDS)
        heard = _read_signs(signs)
        if heard is None:
            return
        place = next((line for line in reversed(heard.splitlines()) if line), place)
        still = 0 if heard or _is_stopped(parent) else still + 1
    _end(parent, told, watched, place or "start-up", still * _POLL_SECONDS)


def _read_signs(file: int) -> str | None:
    """Text that has come through the pipe; None when its other end is closed."""
    parts: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(file, 65536):
            parts.append(part)
        return None
    return b"".join(parts).decode(errors="replace")


def _is_stopped(process: int) -> bool:
    """Whether a process is stopped by a signal or held by a debugger; not to be read is no answer."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return state.rsplit(")", 1)[1].split()[0] in "Tt"


def _end(parent: int, told: int, watched: Watched, place: str, seconds: float) -> None:
    before = _size(watched.stacks)
    with contextlib.suppress(OSError):
        signal_main_thread(parent, watched.stack_signal)
        time.sleep(_STACK_SECONDS)
    line = _line_at(watched.stacks, before)
    print(
        f"moe-pretrain: stuck, in one place of its loop for {seconds:.0f} s (parallel.timeout_seconds): "
        f"{watched.name}, last seen at {place}{line and f', in {line}'}, which keeps the interpreter's lock; "
        f"stacks in {watched.stacks.parent}",
        file=sys.stderr,
        flush=True,
    )
    os.write(told, b"x")
    time.sleep(_END_SECONDS)
    os.kill(parent, signal.SIGKILL)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _line_at(stacks: Path, start: int) -> str:
    """The innermost line outside of torch of the thread that holds the lock, of what was appended to a file of stacks.

    The C code that writes it calls that thread the current one.
    """
    try:
        text = stacks.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return ""
    for row in text.partition("Current thread")[2].partition("\n\n")[0].splitlines():
        words = row.strip().split('"')
        if words[0] == "File " and len(words) == 3 and _OF_TORCH not in words[1]:
            number, _, function = words[2].removeprefix(", line ").partition(" in ")
            return f"{function} ({Path(words[1]).name}:{number})"
    return ""
