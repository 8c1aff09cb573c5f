"""Download a file with resume, progress and a check of its content."""

import html.parser
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from crossformer_vision.errors import UserError

TIMEOUT = 60  # seconds without data
PAGE_BYTES = 1 << 20  # maximum bytes that are read from an HTML page
BLOCK_BYTES = 1 << 18


def check_connection(url: str, timeout: float = 5) -> None:
    """Check that the host of a URL, or the proxy, accepts connections.

    Args:
        url: Address.
        timeout: Seconds to wait.

    Raises:
        UserError: If the connection fails.
    """
    target = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host, port = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except OSError as error:
        raise UserError(f"no connection to {host} ({error})") from None


def download(url: str, path: Path, check: Callable[[Path], None]) -> None:
    """Download a file once, even if several processes need it.

    Data is written to ``<path>.part``, from which an interrupted download is resumed. The file is renamed to
    ``path`` after the check.

    Args:
        url: Address.
        path: File to write.
        check: Function that raises a ``UserError`` if a downloaded file is wrong.

    Raises:
        UserError: If the download fails or the file is wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _process_lock(f"{path}.lock"):
        if path.exists():
            return
        part = path.with_name(path.name + ".part")
        total = _fetch(url, part, path)
        size = part.stat().st_size
        if total is not None and size < total:
            raise UserError(f"{url}: truncated, received {size} of {total} bytes. Try again to resume")
        try:
            check(part)
        except UserError as error:
            part.unlink()
            raise UserError(f"{url}: {error}. The file was removed; try again") from None
        part.replace(path)


@contextmanager
def _process_lock(path: str) -> Iterator[None]:
    """Lock between processes. Uses a lock file if the file system has no locks."""
    lock: BaseFileLock = FileLock(path)
    try:
        lock.acquire()
    except (NotImplementedError, OSError):
        lock = SoftFileLock(path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, part: Path, path: Path) -> int | None:
    """Download into ``part``, resuming from what it contains.

    Returns:
        Size of the whole file, or ``None`` if the server does not send it.
    """
    offset = part.stat().st_size if part.exists() else 0
    try:
        with _open(url, offset) as response:
            if response.status != 206:
                offset = 0
            length = response.headers.get("Content-Length")
            total = offset + int(length) if length else None
            if total is not None and shutil.disk_usage(path.parent).free < total - offset:
                raise UserError(f"{path.parent}: not enough disk space for {path.name} ({total >> 20} MB)")
            _copy(response, part, path.name, offset, total)
            return total
    except urllib.error.HTTPError as error:
        size = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if error.code == 416 and size == str(offset):  # complete, but not checked
            return offset
        if error.code == 416:  # longer than the file
            part.unlink()
        raise UserError(f"{url}: HTTP {error.code} {error.reason}. Try again") from None
    except (OSError, HTTPException) as error:
        raise UserError(f"{url}: {error}. Try again to resume the download") from None


def _copy(response: HTTPResponse, part: Path, name: str, offset: int, total: int | None) -> None:
    """Append a response to a file with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with part.open("ab" if offset else "wb") as file, Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task(name, total=total, completed=offset)
        while block := response.read(BLOCK_BYTES):
            file.write(block)
            progress.advance(bar, len(block))


class _ConfirmationForm(html.parser.HTMLParser):
    """Form on Google Drive's page "too large to scan for viruses".

    Args:
        page: HTML of the page.

    Attributes:
        action: Address to request.
        fields: Names and values of the form.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the form's action and fields."""
        values = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.action = values.get("action", "")
        elif tag == "input" and "name" in values:
            self.fields[values["name"]] = values.get("value", "")


def _open(url: str, offset: int) -> HTTPResponse:
    """Response with the file from an offset, after Google Drive's confirmation page if there is one."""
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    if not _is_page(response):
        return response
    form = _ConfirmationForm(response.read(PAGE_BYTES).decode("utf-8", "replace"))
    if "confirm" in form.fields:
        action = urllib.parse.urljoin(url, form.action)
        confirmed = f"{action}?{urllib.parse.urlencode(form.fields)}"
        response = urllib.request.urlopen(urllib.request.Request(confirmed, headers=headers), timeout=TIMEOUT)
        if not _is_page(response):
            return response
    raise UserError(
        f"{url}: answered with a web page instead of the file; its quota may be used up. Try later"
    )


def _is_page(response: HTTPResponse) -> bool:
    return "text/html" in response.headers.get("Content-Type", "")
