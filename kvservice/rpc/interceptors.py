"""What surrounds every handler: errors become statuses here, so that handlers need no ``try``."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from kvservice_api.errors import InvalidRequest, KVError
from kvservice_api.status import grpc_code, to_status

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Unary = Callable[[Any, Context], Awaitable[Any]]
Streaming = Callable[[Any, Context], AsyncIterator[Any]]

_DETAILS_KEY = "grpc-status-details-bin"


def guarded(handler: Unary, parse: Callable[[bytes], Any] | None = None) -> Unary:
    """A handler that answers once or writes to its context, its errors turned into statuses.

    `parse` reads the one request of a unary call: here, for where grpc does it the caller gets no reason.
    """

    @functools.wraps(handler)
    async def call(request: Any, context: Context) -> Any:
        try:
            return await handler(request if parse is None else parse(request), context)
        except KVError as error:
            await _abort(context, error)
        except DecodeError as error:
            await _abort(context, InvalidRequest(f"a request of {handler.__name__} is malformed: {error}"))
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError as error:
            # A write failed: the client is gone, and nobody is left to be told. Not worth an error in the log.
            raise asyncio.CancelledError from error
        except Exception:  # A mistake of ours: it ends this call with a reason in the log, and no other one.
            log.exception("a handler failed: %s", handler.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the daemon's log has the details")

    return call


async def _abort(context: Context, error: KVError) -> NoReturn:
    details = ((_DETAILS_KEY, to_status(error).SerializeToString()),)
    await context.abort(grpc_code(error), error.message, details)
    raise AssertionError("abort raises")
