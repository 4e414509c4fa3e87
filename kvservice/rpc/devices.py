"""DeviceService: the RPCs of ``devices.proto``, each a few lines over the transport ``cuda_ipc``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing

from kvservice.device.cuda_ipc import CudaIpc
from kvservice.device.page_memory import ArrayPlace, FencePlace, LayerArrays, MemoryPlaces
from kvservice.device.registration import ChainOrder, PageIds, PageLoad
from kvservice.rpc.blocks import save_header, save_response
from kvservice.rpc.calls import Callers, Context
from kvservice.store.store import BlockStore
from kvservice.store.types import Span
from kvservice_api.errors import IncompleteSave, InvalidRequest
from kvservice_api.layout import Shard
from kvservice_api.v1 import devices_pb2 as pb


class DeviceService:
    def __init__(self, store: BlockStore, cuda_ipc: CudaIpc) -> None:
        self._store = store
        self._callers = Callers(store)
        self._cuda_ipc = cuda_ipc

    async def RegisterMemory(self, request: pb.RegisterMemoryRequest, context: Context) -> pb.RegisterMemoryResponse:
        caller = self._callers.of(context, request.client_id)
        shard = Shard.from_proto(request.shard) if request.HasField("shard") else None
        number = await self._cuda_ipc.register(caller, request.layout_fingerprint, shard, _places(request))
        return pb.RegisterMemoryResponse(registration_id=number)

    async def UnregisterMemory(
        self, request: pb.UnregisterMemoryRequest, context: Context
    ) -> pb.UnregisterMemoryResponse:
        caller = self._callers.of(context, request.client_id)
        await self._cuda_ipc.unregister(caller, request.registration_id)
        return pb.UnregisterMemoryResponse()

    async def LoadToDevice(self, request: pb.LoadToDeviceRequest, context: Context) -> None:
        caller = self._callers.of(context, request.client_id)
        order = PageLoad(
            request.first_token,
            _page_ids(request.groups),
            tuple(request.begin_tokens),
            request.end_token,
            request.fence_word,
            request.fence_value,
        )
        blocks = Span(request.first_block, request.block_count)
        copied = self._cuda_ipc.load(caller, request.registration_id, request.lease_id, blocks, order)
        async with aclosing(copied) as layers:
            async for count in layers:
                await context.write(pb.LoadToDeviceResponse(layers_copied=count))

    async def SaveFromDevice(self, requests: AsyncIterator[pb.SaveFromDeviceRequest], context: Context) -> None:
        incoming = self._store.saves.incoming(self._callers.of(context), requests)
        first = await incoming.next()
        if not first.HasField("begin"):
            raise InvalidRequest("the first message of a save must be its begin", field="begin")
        begin = first.begin
        caller = self._callers.of(context, begin.header.client_id)
        header, on_ssd = save_header(begin.header)
        chains = [ChainOrder(chain.first_token, _page_ids(chain.groups)) for chain in begin.chains]
        async with self._cuda_ipc.save(caller, begin.registration_id, header, chains) as save:
            await context.write(pb.SaveFromDeviceResponse())
            async with aclosing(save.gather()) as layers:
                async for count in layers:
                    await context.write(pb.SaveFromDeviceResponse(layers_gathered=count))
            if not (await incoming.next()).commit:
                raise IncompleteSave("the second message of a save must be its commit")
            outcome = await save.commit(on_ssd=on_ssd)
        await context.write(pb.SaveFromDeviceResponse(result=save_response(outcome)))


def _page_ids(groups: Iterable[pb.PageIds]) -> PageIds:
    """Without a copy: there may be a million of them."""
    return [group.ids for group in groups]


def _places(request: pb.RegisterMemoryRequest) -> MemoryPlaces:
    layers = [
        LayerArrays(
            _array(layer.keys),
            _array(layer.values) if layer.HasField("values") else None,
            layer.pages,
            layer.page_tokens,
            layer.group,
        )
        for layer in request.layers
    ]
    fence = FencePlace(request.fence.allocation, request.fence.offset_bytes, request.fence.count)
    return MemoryPlaces(request.pci_bus_id, list(request.allocations), layers, fence)


def _array(array: pb.PageArray) -> ArrayPlace:
    strides = array.page_stride, array.head_stride, array.token_stride, array.dim_stride
    return ArrayPlace(array.allocation, array.offset_bytes, strides)
