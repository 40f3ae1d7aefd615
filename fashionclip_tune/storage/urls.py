"""Opens what lies behind a URL or a command: object storage through Arrow, the rest by curl or a shell."""

import re
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from fashionclip_tune.machine.child_processes import end_with_us

SCHEMES = ("https", "http", "s3", "gs", "pipe")
_REQUEST_BYTES = 2**23  # each is a request of its own, which takes tens of milliseconds
_LEGAL = "%/:?#[]@!$&'()*+,;="  # in an address; quote knows letters and digits
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(pipe):")


def scheme_of(location: str) -> str | None:
    """``https``, ``s3``, ``pipe`` and so on; None for a path."""
    found = _SCHEME.match(location)
    return None if found is None else (found[1] or found[2]).lower()


def open_url(url: str) -> Any:
    """A binary stream; reading it, or closing it, raises OSError where what is behind it fails."""
    if scheme_of(url) in ("s3", "gs"):
        from pyarrow import fs

        try:
            filesystem, path = fs.FileSystem.from_uri(quote(url, safe=_LEGAL))
        except ValueError as error:
            raise OSError(str(error)) from error
        return filesystem.open_input_stream(path, buffer_size=_REQUEST_BYTES)
    from webdataset.gopen import Pipe, gopen  # which imports torch, for seconds; a configuration asks for schemes only

    if is_pipe := scheme_of(url) == "pipe":  # as gopen does, in a group of its own; 141: we stopped reading
        stream = Pipe(url.removeprefix("pipe:"), mode="rb", shell=True, ignore_status=[141], start_new_session=True)
    else:
        stream = gopen(url)
    if (command := getattr(stream, "proc", None)) is not None:
        end_with_us(command.pid, leads_group=is_pipe)
    return stream


def read_url(url: str) -> bytes:
    """All of a small file.

    Raises:
        OSError: it is not there or cannot be reached.
    """
    with open_url(url) as stream:
        content: bytes = stream.read()
    return content


def beside(url: str, name: str) -> str | None:
    """The URL of ``name`` in the same folder; a query, such as a signature, is kept. None for a pipe."""
    if scheme_of(url) == "pipe":
        return None
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def name_of(url: str) -> str:
    """The file's name, for messages: the last part of the path; of a pipe, that of its last word."""
    if scheme_of(url) == "pipe":
        words = url.removeprefix("pipe:").split()
        return words[-1].rpartition("/")[2].strip("'\"") if words else url
    return urlsplit(url).path.rpartition("/")[2] or url
