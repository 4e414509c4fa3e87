"""The interceptor of every handler: it turns errors into statuses, so that handlers need no ``try``."""

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

    `parse` reads the request of a unary call here, because a parse error inside grpc gives the caller no reason.
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
            # A write failed because the client has disconnected: no error for the log, and no client to answer.
            raise asyncio.CancelledError from error
        except Exception:  # A bug of the daemon: it ends this call only, with its traceback in the log.
            log.exception("a handler failed: %s", handler.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the daemon's log has the details")

    return call


async def _abort(context: Context, error: KVError) -> NoReturn:
    details = ((_DETAILS_KEY, to_status(error).SerializeToString()),)
    await context.abort(grpc_code(error), error.message, details)
    raise AssertionError("abort raises")
