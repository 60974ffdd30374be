"""A Hugging Face dataset as batches of rows, streamed through ``datasets`` and taken up again at any of them.

Where a batch ends is a few numbers, with which ``datasets`` opens the file that comes next and no other. Failures of
the network are tried again with growing waits, from the start of the batch, so a batch is whole or it is not there.

The real hub has never been seen from the machine where this was written: tested are files over HTTP and ``file://``.
"""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moe_pretrain.data.documents.config import HubCorpusConfig
from moe_pretrain.data.documents.document import CorpusRow, Document, row_of
from moe_pretrain.system.words import one_line

_LONGEST_WAIT_SECONDS = 60.0
_NETWORK_PACKAGES = ("aiohttp", "http", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")
_OVERLOADED = (408, 425, 429)  # statuses below 500 that another try may mend


@dataclass(frozen=True)
class Place:
    """Position of a streamed source between two rows.

    Attributes:
        rows: Rows before it.
        state: What ``datasets`` goes on from without reading them again; None where it must.
    """

    rows: int
    state: dict[str, Any] | None


START = Place(0, None)


@dataclass
class Retries:
    """Waits between tries: one second, then twice as long each time up to a minute, until their sum would pass a limit.

    Attributes:
        limit_seconds: The limit; 0 for no second try.
        report: Called with a line before each wait.
    """

    limit_seconds: float
    report: Callable[[str], None]
    _next_seconds: float = 1.0
    _waited_seconds: float = 0.0

    def wait(self, reason: str) -> bool:
        """Wait before another try; False, at once, when there is to be none."""
        if self._waited_seconds + self._next_seconds > self.limit_seconds:
            return False
        self.report(f"{reason}: trying again in {self._next_seconds:.0f} s")
        time.sleep(self._next_seconds)
        self._waited_seconds += self._next_seconds
        self._next_seconds = min(2 * self._next_seconds, _LONGEST_WAIT_SECONDS)
        return True

    def reset(self) -> None:
        """Begin anew: something was read."""
        self._next_seconds, self._waited_seconds = 1.0, 0.0


def hub_batches(
    config: HubCorpusConfig, start: Place, batch_bytes: int, retries: Retries
) -> Iterator[tuple[tuple[CorpusRow, ...], Place]]:
    """Rows from ``start`` on, about ``batch_bytes`` of text at a time, each batch with the place after it.

    Raises:
        ValueError: The hub or the dataset cannot be read, or a row has no text.
    """
    if config.files is None and start == START:
        require_network(f"data=hub data.name={config.name}", "use data=builtin or data=files")
    rows: list[CorpusRow] = []
    while True:
        rows, size = [], 0
        try:
            stream = open_stream(config, start)
            for number, row in enumerate(stream, start=start.rows + 1):
                rows.append(_row(number, row, config))
                size += len(rows[-1].text) if isinstance(rows[-1], Document) else 0
                if size >= batch_bytes:
                    start = Place(number, stream.state_dict())
                    retries.reset()
                    yield tuple(rows), start
                    rows, size = [], 0
            break
        except Exception as error:
            reason = f"data=hub data.name={config.name}: {one_line(error)}"
            passing = is_passing(error, config, start)
            if not passing or not retries.wait(reason):
                waited = f" (given up after {retries.limit_seconds:.0f} s)" if passing else ""
                raise ValueError(
                    f"data=hub data.name={config.name} data.subset={config.subset} data.split={config.split}: "
                    f"{one_line(error)}{waited}"
                ) from None
    if rows:
        yield tuple(rows), Place(start.rows + len(rows), None)


def _row(number: int, row: dict[str, object], config: HubCorpusConfig) -> CorpusRow:
    try:
        return row_of(f"{config.name}#{number}", row, config.text_column, config.invalid_text, config.invalid_utf8)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None


def open_stream(config: HubCorpusConfig, start: Place) -> Any:
    """The dataset as an iterable of rows that begins at a place and has ``state_dict``."""
    import datasets

    # Its loggers would put a line of their own before each of our errors, and its waits do not grow.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    for kind in ("READ", "OPEN"):
        setattr(datasets.config, f"STREAMING_{kind}_MAX_RETRIES", 1)
        setattr(datasets.config, f"STREAMING_{kind}_RETRY_INTERVAL", 0)
    options: dict[str, Any] = {} if config.version is None else {"revision": config.version}
    if config.files is not None:
        options["data_files"] = list(config.files)
    stream = datasets.load_dataset(config.name, config.subset, split=config.split, streaming=True, **options)
    if start.state is not None:
        stream.load_state_dict(start.state)
    elif start.rows:
        stream = stream.skip(start.rows)
    return stream


def is_passing(error: BaseException, config: HubCorpusConfig, start: Place) -> bool:
    """Whether a failure may be gone at the next try: the network's, not the dataset's."""
    chain = [error]
    while cause := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__):
        chain.append(cause)
    for link in chain:
        status = getattr(link, "status", None) or getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status >= 500 or status in _OVERLOADED
    if any("Offline" in type(link).__name__ for link in chain):
        return False
    if any(isinstance(link, FileNotFoundError) for link in chain):
        # fsspec says the same of a file that is missing and of a server that fails.
        addresses = [file for file in config.files or () if file.startswith(("http://", "https://"))]
        return not any(_is_missing(address) for address in addresses) if addresses else start != START
    return any(
        isinstance(link, ConnectionError | TimeoutError) or type(link).__module__.split(".")[0] in _NETWORK_PACKAGES
        for link in chain
    )


def _is_missing(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code not in _OVERLOADED
    except (OSError, http.client.HTTPException):
        return False
    return False


def require_network(what: str, instead: str) -> None:
    """Ask the Hugging Face hub for a sign of life, once, within ten seconds.

    The hub's own clients try again for half a minute and then show forty lines.

    Args:
        what: The setting that needs the hub, for the error line.
        instead: What the user can do without it.

    Raises:
        ValueError: The hub does not answer.
    """
    import datasets

    hub = datasets.config.HF_ENDPOINT
    request = urllib.request.Request(hub, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        return  # an answer, whatever its status
    except OSError as error:
        reason = one_line(getattr(error, "reason", error))
        raise ValueError(f"{what} cannot be reached: {hub}: {reason}; {instead}") from None
