"""``python -m tests.distant_daemon serve ...``: the real daemon, but each of its answers to a lookup takes 50 ms."""

from __future__ import annotations

import asyncio
import sys

from kvservice import __main__
from kvservice.rpc.blocks import BlockService
from kvservice.rpc.calls import Context
from kvservice_api.v1 import blocks_pb2 as pb

ANSWER_S = 0.05

look_up = BlockService.LookupPrefix


async def look_up_later(
    service: BlockService, request: pb.LookupPrefixRequest, context: Context
) -> pb.LookupPrefixResponse:
    await asyncio.sleep(ANSWER_S)
    return await look_up(service, request, context)


if __name__ == "__main__":
    BlockService.LookupPrefix = look_up_later  # type: ignore[assignment, method-assign]
    sys.exit(__main__.main())
