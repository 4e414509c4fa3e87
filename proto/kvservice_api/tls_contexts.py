"""TLS contexts for connections on which many bytes are received."""

from __future__ import annotations

import ssl
from functools import partial
from typing import Final

from kvservice_api import copying

# Two records of the largest size. With more, OpenSSL moves all that it has read once per record, which takes longer
# than the reads. It frees the buffer whenever that is empty.
_READ_BYTES: Final = 33 << 10


def new_context(protocol: int) -> ssl.SSLContext:
    """As `ssl.SSLContext`, but its sockets read ahead, where the C extension finds the OpenSSL 3 of Python.

    By default OpenSSL reads each record of 16 KiB in two parts: 5 bytes, and the rest. Reading ahead, it takes up to
    two records at once. So there may be bytes for a reader although the socket is not readable: read until
    `ssl.SSLWantReadError` before waiting for it.
    """
    make = partial(ssl.SSLContext, protocol)
    if copying.native is None:
        return make()
    context: ssl.SSLContext = copying.native.read_ahead(make, _READ_BYTES)
    return context
