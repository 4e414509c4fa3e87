"""An engine's pages in GPU memory that the daemon opens by CUDA IPC: it copies blocks to and from them itself.

This module makes the calls, and imports nothing of CUDA: `ExportedPages` is the engine's side. The registration belongs
to the client's attachment. It is made in the background, again after a restart of the daemon, and some time after an
error of it; meanwhile the caller uses other transports.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from typing import NamedTuple, Protocol, Self

from kvservice_api.errors import (
    Cancelled,
    DaemonUnavailable,
    DeadlineExceeded,
    DeviceUnavailable,
    InvalidFrame,
    InvalidRequest,
    KVError,
    NotShared,
    RegistrationEnded,
)
from kvservice_api.keys import BlockChain
from kvservice_api.layout import Layout, Shard
from kvservice_api.v1 import devices_pb2 as pb
from kvservice_client import forks
from kvservice_client.attach_stream import Attachment
from kvservice_client.channel import DEVICES
from kvservice_client.connection import Connection
from kvservice_client.rate_limited_log import RateLimitedLog
from kvservice_client.retry import Deadline, TransferDeadline
from kvservice_client.transports.base import Durability, LoadOrder, SaveResult, SaveSet
from kvservice_client.transports.grpc import save_header, save_results
from kvservice_client.transports.ordered import OrderedTransports

log = logging.getLogger(__name__)

NAME = "cuda_ipc"

_REGISTER_S = 60.0  # The daemon's first registration compiles kernels.
_CLOSE_S = 5.0
_PAUSE_S = 60.0  # After an error, until the daemon is asked again.
# The daemon may still be copying: it has not answered, or its wait for the end of the copies has failed too.
_MAY_COPY = (DaemonUnavailable, DeadlineExceeded, Cancelled, DeviceUnavailable)

PageIds = Sequence[Sequence[int]]  # Of one sequence, from its first token on: per group of layers.


class ExportedPages(Protocol):
    """Pages of this process that another process may open. Any thread may call it."""

    @property
    def groups(self) -> Sequence[int]:
        """Of each layer: layers of one group have the same tokens in pages of the same numbers."""

    def description(self) -> pb.RegisterMemoryRequest:
        """Handles and places, without a client. Raises DeviceUnavailable if CUDA does not export the memory."""

    def begin_load(self) -> tuple[int, int]:
        """A fence word for one load, and its value. Raises Overloaded if too many loads run."""

    def revoke(self, words: Sequence[int]) -> None:
        """On return the daemon writes no more for these loads."""

    def end_load(self, word: int) -> None:
        """Another load may have the word."""


class WriteFence:
    """Permits the daemon to write into the pages, for one load. Any thread may end it."""

    def __init__(self, pages: ExportedPages) -> None:
        """Raises as `ExportedPages.begin_load`."""
        self._pages = pages
        self.word, self.value = pages.begin_load()
        self._lock = threading.Lock()
        self._is_ended = False

    def end(self, *, is_certain: bool = False) -> None:
        """On return the daemon writes nothing more for this load. `is_certain`: the daemon has reported that."""
        with self._lock:  # Until the first call has done it.
            if not self._is_ended:
                if not is_certain:
                    self._pages.revoke([self.word])
                self._end()

    def _end(self) -> None:
        self._is_ended = True
        self._pages.end_load(self.word)

    @staticmethod
    def end_all(fences: Sequence[WriteFence]) -> None:
        """As `end` of each, in the time of one. All are of the same pages; for one thread."""
        with ExitStack() as locks:
            for fence in fences:
                locks.enter_context(fence._lock)
            running = [fence for fence in fences if not fence._is_ended]
            if running:
                running[0]._pages.revoke([fence.word for fence in running])
            for fence in running:
                fence._end()


class LoadPlace(NamedTuple):
    """Where a load writes: the sequence whose token `first_token` begins the first loaded block."""

    first_token: int
    page_ids: PageIds
    begin_tokens: Sequence[int]  # Per group: earlier tokens of the sequence are not written.
    end_token: int


class SavePlace(NamedTuple):
    """Where the tokens of a chain are: the sequence whose token `first_token` begins its first block."""

    first_token: int
    page_ids: PageIds


class _Registration(NamedTuple):
    attachment: Attachment
    number: int


class _Refusal(NamedTuple):
    attachment: Attachment
    until_s: float  # By the clock. Then the daemon is asked again.


class DeviceMemory:
    """Made by `BlockCache.device_memory`. Thread-safe. In a forked child it is not usable."""

    def __init__(
        self, connection: Connection, transports: OrderedTransports, layout: Layout, shard: Shard, pages: ExportedPages
    ) -> None:
        self._connection, self._transports, self._pages = connection, transports, pages
        self._layout, self._shard = layout, shard
        self._lock = threading.Lock()
        self._generation = forks.generation
        self._clock = connection.clock
        self._registered: _Registration | None = None  # The daemon may have it open, also after a refusal.
        self._refusal: _Refusal | None = None  # What is registered must be registered again.
        self._closed = threading.Event()
        self.refusal: KVError | None = None  # Why it was not used, the last time that it was not.
        self._lines = RateLimitedLog(log)

    @property
    def groups(self) -> Sequence[int]:
        return self._pages.groups

    @property
    def is_ready(self) -> bool:
        """Whether the daemon has opened the pages. If not, it is asked to in the background. Does not wait."""
        if self._closed.is_set() or self._generation != forks.generation:
            return False
        attachment = self._connection.attach_stream.latest
        if attachment is None:
            return False
        if self._is_open_for(attachment):
            return True
        if not self._is_refused_by(attachment):
            self._connection.background.submit_once(self, self.register)
        return False

    def _is_open_for(self, attachment: Attachment) -> bool:
        registered, refusal = self._registered, self._refusal
        is_refused = refusal is not None and refusal.attachment == attachment
        return registered is not None and registered.attachment == attachment and not is_refused

    def _is_refused_by(self, attachment: Attachment) -> bool:
        refusal = self._refusal
        return refusal is not None and refusal.attachment == attachment and self._clock.now_s() < refusal.until_s

    def register(self) -> bool:
        """Have the daemon open the pages, if it has not. Returns whether it has. Waits for the daemon."""
        with self._lock:
            deadline = self._connection.deadline(_REGISTER_S)
            try:
                attachment, limits = self._connection.retried(
                    lambda: self._connection.session(self._layout, deadline), deadline
                )
            except KVError:
                return False  # The next call that needs the daemon raises it.
            if self._closed.is_set() or self._is_refused_by(attachment):
                return False
            if self._is_open_for(attachment):
                return True
            pause_s = _PAUSE_S
            try:
                self._unregister(attachment, deadline)
                pause_s = math.inf  # What follows stays as it is until the daemon restarts.
                if NAME not in limits.transports:
                    why = limits.cuda_ipc_refused_because or "the daemon does not offer it"
                    raise DeviceUnavailable(why)
                request = self._pages.description()
                request.client_id = attachment.client_id
                request.layout_fingerprint = self._layout.fingerprint
                request.shard.CopyFrom(self._shard.to_proto())
                pause_s = _PAUSE_S
                call = self._connection.channel.call
                answer = call(DEVICES + "RegisterMemory", request, pb.RegisterMemoryResponse, deadline)
            except KVError as error:
                pause_s = math.inf if isinstance(error, InvalidRequest) else pause_s
                self._refusal = _Refusal(attachment, self._clock.now_s() + pause_s)
                self._note(error)
                return False
            self._registered, self._refusal = _Registration(attachment, answer.registration_id), None
            if self._closed.is_set():  # Meanwhile.
                with suppress(KVError):
                    self._unregister(attachment, self._connection.deadline(_CLOSE_S))
                return False
            log.info("the daemon copies to and from this process's GPU memory itself (cuda_ipc)")
            return True

    def fell_back(self, error: KVError) -> None:
        """Another transport is used instead: for once; until the pages are registered again; or for some time."""
        registered = self._registered
        if registered is not None and isinstance(error, (DeviceUnavailable, RegistrationEnded)):
            pause_s = _PAUSE_S if isinstance(error, DeviceUnavailable) else 0.0
            self._refusal = _Refusal(registered.attachment, self._clock.now_s() + pause_s)
        self._note(error)

    def _note(self, error: KVError) -> None:
        self.refusal = error
        self._transports.meter.fell_back(NAME, error.message)
        self._lines.info("cuda_ipc is not used: %s", error.message, kind=str(error.reason))

    def close(self) -> None:
        """On return the daemon has closed the pages, or does not answer: then it closes them with the attachment."""
        self._closed.set()
        if self._generation != forks.generation:
            return
        deadline = self._connection.deadline(_CLOSE_S)
        if not self._lock.acquire(timeout=_CLOSE_S):
            return  # The registration that is being made is ended once the daemon has answered.
        try:
            if self._registered is not None:
                with suppress(KVError):
                    self._unregister(self._registered.attachment, deadline)
        finally:
            self._lock.release()

    def _unregister(self, attachment: Attachment, deadline: Deadline) -> None:
        """With the lock. The daemon itself has ended what another attachment had."""
        registered = self._registered
        if registered is not None and registered.attachment == attachment:
            request = pb.UnregisterMemoryRequest(client_id=attachment.client_id, registration_id=registered.number)
            call = self._connection.channel.call
            call(DEVICES + "UnregisterMemory", request, pb.UnregisterMemoryResponse, deadline)
        self._registered = None

    def fence(self) -> WriteFence:
        """For one `load`. Raises Overloaded if too many loads run."""
        return WriteFence(self._pages)

    def load(
        self, order: LoadOrder, place: LoadPlace, fence: WriteFence, deadline: TransferDeadline
    ) -> Generator[int, None, None]:
        """How many layers are in the pages, after each answer of the daemon; the last is all of them.

        Once it has ended, or is closed, or the fence has ended, nothing is written any more. Raises RegistrationEnded,
        DeviceUnavailable, NotShared; as `Transport.load`.
        """
        number = self._number_for(order.client_id)
        request = pb.LoadToDeviceRequest(
            client_id=order.client_id,
            registration_id=number,
            lease_id=order.lease_id,
            first_block=order.first_block,
            block_count=order.block_count,
            first_token=place.first_token,
            groups=_page_ids(place.page_ids),
            begin_tokens=place.begin_tokens,
            end_token=place.end_token,
            fence_word=fence.word,
            fence_value=fence.value,
        )
        is_certain, copied = False, 0
        stream, begin_s = self._connection.channel.stream, self._connection.clock.now_s()
        try:
            with closing(stream(DEVICES + "LoadToDevice", request, pb.LoadToDeviceResponse, deadline)) as answers:
                for answer in answers:
                    copied = answer.layers_copied
                    is_certain = copied == order.layer_count
                    yield copied
            is_certain = True
        except KVError as error:
            is_certain = is_certain or not isinstance(error, _MAY_COPY)
            raise
        finally:
            fence.end(is_certain=is_certain)
        if copied != order.layer_count:
            raise InvalidFrame("the daemon ended the call before all layers were copied")
        seconds = self._connection.clock.now_s() - begin_s
        self._transports.meter.add(NAME, loads=1, loaded_bytes=order.size_bytes, load_seconds=seconds)

    def save(
        self, saves: Sequence[tuple[BlockChain, SavePlace]], durability: Durability, *, answer_s: float
    ) -> DeviceSave:
        """Begin a save of chains from the pages, with as many blocks as `BlockCache.reserve` takes.

        The wait until the daemon has read the pages lasts at most `answer_s`. Raises RegistrationEnded.
        """
        registered = self._registered
        if registered is None:
            raise RegistrationEnded("the daemon has not opened the pages")
        saved = SaveSet(
            registered.attachment.client_id, [chain for chain, _ in saves], durability, self._layout, self._shard
        )
        begin = pb.SaveFromDeviceBegin(
            header=save_header(saved),
            registration_id=registered.number,
            chains=[
                pb.ChainPages(first_token=place.first_token, groups=_page_ids(place.page_ids)) for _, place in saves
            ],
        )
        return DeviceSave(self._connection, self._transports, saved, begin, answer_s)

    def _number_for(self, client_id: bytes) -> int:
        registered = self._registered
        if registered is None or registered.attachment.client_id != client_id:  # What is registered stays as it is.
            raise NotShared("the daemon has not opened the pages for the attachment that has the lease")
        return registered.number


class DeviceSave:
    """One save from pages. A context manager: leaving it without a commit stores nothing. For one thread at a time."""

    def __init__(
        self,
        connection: Connection,
        transports: OrderedTransports,
        saved: SaveSet,
        begin: pb.SaveFromDeviceBegin,
        answer_s: float,
    ) -> None:
        self._saved, self._transports, self._clock = saved, transports, connection.clock
        self._requests: queue.SimpleQueue[pb.SaveFromDeviceRequest | None] = queue.SimpleQueue()
        self._requests.put(pb.SaveFromDeviceRequest(begin=begin))
        self._deadline = connection.transfer_deadline(answer_s, per_layer=True)
        requests: Iterator[pb.SaveFromDeviceRequest] = iter(self._requests.get, None)
        self._answers = connection.channel.converse(
            DEVICES + "SaveFromDevice", requests, pb.SaveFromDeviceResponse, self._deadline
        )
        self._commit_s, self._seconds = connection.timeout_s, 0.0

    def gather(self) -> None:
        """Wait until the daemon has read the pages. Raises KVErrors."""
        with self._deadline.layer():  # One time for all of it: the engine may wait for its pages.
            while self._next().layers_gathered < self._saved.shard.layers:
                pass

    def commit(self) -> list[SaveResult]:
        """Store the blocks: the pages did not change until `gather` had returned. The result of each chain.

        Waits for the daemon as long as any call of the client. Raises KVErrors. The save has ended then too.
        """
        try:
            self._requests.put(pb.SaveFromDeviceRequest(commit=True))
            with self._deadline.layer(self._commit_s):
                answer = self._next()
            if not answer.HasField("result"):
                raise InvalidFrame("the daemon did not answer with a result")
        finally:
            self.close()
        size_bytes = sum(
            self._saved.layout.shard_slice_bytes(self._saved.shard, layer, 1)
            for layer in range(self._saved.shard.layer_begin, self._saved.shard.layer_end)
        ) * sum(self._saved.token_counts[block] for block in answer.result.stored_blocks)
        self._transports.meter.add(NAME, saves=1, saved_bytes=size_bytes, save_seconds=self._seconds)
        return save_results(answer.result, self._saved.chains)

    def close(self) -> None:
        self._requests.put(None)
        self._answers.close()

    def _next(self) -> pb.SaveFromDeviceResponse:
        begin_s = self._clock.now_s()
        answer = next(self._answers, None)
        self._seconds += self._clock.now_s() - begin_s
        if answer is None:
            raise InvalidFrame("the daemon ended the save without a result")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _page_ids(groups: PageIds) -> list[pb.PageIds]:
    return [pb.PageIds(ids=ids) for ids in groups]
