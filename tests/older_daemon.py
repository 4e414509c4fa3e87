"""``python -m tests.older_daemon serve ...``: the real daemon, but it says that it has no key generations and hints."""

from __future__ import annotations

import sys

from kvservice import __main__
from kvservice.rpc.blocks import BlockService
from kvservice.rpc.calls import Context
from kvservice_api.v1 import blocks_pb2 as pb

get_capabilities = BlockService.GetCapabilities


async def without_generations(
    service: BlockService, request: pb.GetCapabilitiesRequest, context: Context
) -> pb.GetCapabilitiesResponse:
    answer = await get_capabilities(service, request, context)
    answer.ClearField("keeps_generations")
    answer.ClearField("takes_hints")
    answer.ClearField("restores_sessions")
    return answer


if __name__ == "__main__":
    BlockService.GetCapabilities = without_generations  # type: ignore[assignment, method-assign]
    sys.exit(__main__.main())
