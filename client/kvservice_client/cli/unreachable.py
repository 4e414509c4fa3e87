"""Why a daemon cannot be reached, found with plain connections, because gRPC reports only the last address it tried."""

from __future__ import annotations

import socket
import ssl
import stat
from pathlib import Path

from kvservice_api.address import Address, TcpAddress, UnixAddress

_TIMEOUT_S = 1.0  # Timeout of each attempt to connect.

_SILENT = (
    "does not answer as a KVService daemon: it hangs, or is another program. See which one it is, or correct --address."
)
_BULK = "If this is a daemon's bulk port, name its gRPC port: by default the number before it."
_START = "Start a daemon with `kvservice serve --store.path FOLDER`, or name another one with --address."


def why_unreachable(address: Address, *, with_tls: bool) -> str:
    """What to do about a daemon that gave no answer. Connects to the address, and waits a few seconds at most.

    `with_tls` says whether the call that failed was made with TLS.
    """
    if isinstance(address, UnixAddress):
        return _why_socket(address)
    try:
        places = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        return f"The host name {address.host} cannot be resolved ({error.strerror}): correct --address."
    is_out_of_reach = False
    for family, kind, protocol, _, place in places[:4]:
        with socket.socket(family, kind, protocol) as probe:
            probe.settimeout(_TIMEOUT_S)
            try:
                probe.connect(place)
            except ConnectionRefusedError:
                continue
            except OSError:
                is_out_of_reach = True
                continue
            return _why_listener(address, str(place[0]), _speaks_tls(probe), with_tls)
    if is_out_of_reach:
        return "The host does not answer: correct --address, or check the network."
    return _START


def _why_listener(address: TcpAddress, host: str, speaks_tls: bool, with_tls: bool) -> str:
    listener = f"The program at {TcpAddress(host, address.port).target}"
    if speaks_tls and with_tls:
        return (
            f"{listener} uses TLS, and one side refused the other: check that --tls-ca has the CA of the daemon's "
            "certificate, and that --tls-server-name is its name; if the daemon requires a client certificate, "
            "give it with --tls-certificate and --tls-key."
        )
    if speaks_tls:
        return f"{listener} uses TLS: give --tls-ca."
    if with_tls:
        return f"{listener} does not use TLS: remove the options --tls-..., or correct --address."
    return f"{listener} {_SILENT} {_BULK}"


def _why_socket(address: UnixAddress) -> str:
    path = Path(address.path)
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return f"{path} is not a socket: correct --address."
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_TIMEOUT_S)
            probe.connect(str(path))
    except PermissionError:
        return (
            "This user may not connect to the socket: the daemon's setting server.unix_socket_access says which users "
            "may, and they need access to all folders on its path."
        )
    except (FileNotFoundError, NotADirectoryError):
        return f"There is no {path}. {_START}"
    except ConnectionRefusedError:
        return f"No process listens on the socket any more. {_START}"
    except OSError as error:
        return f"The socket cannot be used ({error.strerror or error}): correct --address."
    return f"The program that listens on the socket {_SILENT}"


def _speaks_tls(probe: socket.socket) -> bool:
    """Whether the other side answers a TLS handshake. Sends nothing after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        context.wrap_socket(probe).close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False
    return True
