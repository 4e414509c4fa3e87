"""The connector's configuration: `kv_connector_extra_config` in vLLM's `--kv-transfer-config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Literal, Self

from kvservice_api.errors import InvalidRequest
from kvservice_client.client import DEFAULT_ADDRESS

Transport = Literal["auto", "shm", "bulk", "grpc"]
ADDRESS_VARIABLE = "KVSERVICE_ADDRESS"


class LoadMode(StrEnum):
    """When a hit's KV is copied into vLLM's pages."""

    AUTO = "auto"  # BETWEEN_STEPS, or not at all if computing is faster. Before that vLLM shares pages that may fail.
    WHOLE = "whole"  # All layers before the forward of the request's first step.
    LAYERS = "layers"  # Layer i + 1 while the forward computes layer i.
    BETWEEN_STEPS = "between_steps"  # Asynchronously: the request runs once its KV is there, others run meanwhile.


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorSettings:
    """Read once, in each of vLLM's processes."""

    address: str = (
        DEFAULT_ADDRESS  # host:port, or the path of a UNIX socket. By default KVSERVICE_ADDRESS, if it is set.
    )
    transport: Transport = "auto"  # As `kvservice_client.Client`.
    model_id: str = ""  # The model's name in keys. By default vLLM's model, for a local folder its last part.
    model_revision: str = ""  # Which weights. By default the hub's commit, or a hash of the files of a local folder.
    block_tokens: int = 256
    load: LoadMode = LoadMode.AUTO
    save: bool = True
    hints: bool = True  # Whether to report vLLM's queue, and turns that have ended, to the daemon.
    lookup_wait_s: float = 0.02  # How long a request may wait while the daemon answers no lookup.
    wait_s: float = 0.1  # How long a step may wait for a daemon that sends nothing.
    layer_wait_s: float = 1.0  # How long a load may wait for each layer while the daemon sends, such as from SSD.
    ticket_s: float = 30.0  # How long a hit stays leased until the workers load it.
    staging_bytes: int = 256 * 2**20  # Memory per worker for blocks that wait to be sent.

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises InvalidRequest for an unknown name, or a value of a wrong type or range."""
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise InvalidRequest(
                f"kv_connector_extra_config has no {', '.join(unknown)}; it has {', '.join(known)}", field=unknown[0]
            )
        values: dict[str, Any] = {"address": os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS, **given}
        for name, value in values.items():
            values[name] = _checked(name, value, type(known[name].default))
        return cls(**values)


def _checked(name: str, value: Any, kind: type) -> Any:
    if kind is LoadMode:
        if value not in list(LoadMode):
            raise InvalidRequest(f"{name} is {value!r}; it must be one of {', '.join(LoadMode)}", field=name)
        return LoadMode(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise InvalidRequest(f"{name} is {value!r}; it must be of type {kind.__name__}", field=name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
        raise InvalidRequest(f"{name} is {value!r}; it must be greater than 0", field=name)
    return value
