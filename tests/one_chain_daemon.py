"""``python -m tests.one_chain_daemon serve ...``: the real daemon, as one from before saves had further chains.

It does not announce such saves, ignores further chains, and its answers do not name the stored blocks.
"""

from __future__ import annotations

import sys
from typing import Any

from kvservice import __main__
from kvservice.rpc import blocks
from kvservice_api.v1 import blocks_pb2 as pb


def main() -> int:
    service: Any = blocks.BlockService
    save_header, save_response, capabilities = blocks.save_header, blocks.save_response, service.GetCapabilities

    def header_without(header: pb.SaveHeader) -> Any:
        header.ClearField("more")
        return save_header(header)

    def response_without(outcome: Any) -> pb.SaveBlocksResponse:
        response = save_response(outcome)
        response.ClearField("stored_blocks")
        return response

    async def capabilities_without(self: Any, request: pb.GetCapabilitiesRequest, context: Any) -> Any:
        answer = await capabilities(self, request, context)
        answer.ClearField("max_save_chains")
        return answer

    blocks.save_header, blocks.save_response = header_without, response_without
    service.GetCapabilities = capabilities_without
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
