"""An engine in a process of its own, which can be killed. This side does not import torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from multiprocessing.connection import Connection
from typing import Any, Self

from kvservice_client import Client

_STOP_TIMEOUT_S = 10.0


class EngineProcess:
    """The end of the block stops the process."""

    def __init__(self, address: str, model: str, wait_s: float | None = None) -> None:
        """`wait_s` is the one of `Engine`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, address, model, wait_s), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the `Engine`. Blocks until it returns. Ends the program if the process has ended."""
        try:
            self._pipe.send((method, arguments))
            return self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(_STOP_TIMEOUT_S)
            raise SystemExit(f"the engine ended with exit code {self._process.exitcode}") from error

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join(_STOP_TIMEOUT_S)
        self.kill()


def _serve(pipe: Connection, address: str, model: str, wait_s: float | None) -> None:
    """The engine's process: call a method per message, until the other side closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the demo, and the demo stops this process.
    multiprocessing.set_start_method("fork", force=True)  # Locks of libraries are then gone with a killed process.
    os.dup2(2, 1)  # A library's output must not mix with the demo's.
    os.environ.update(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # Threads that spin slow down the daemon. torch reads this at import.
    warnings.filterwarnings("ignore")

    from examples.demo.engine import Engine
    from examples.models import load_model
    from kvservice_adapter.connectors.transformers import UnsupportedModel
    from kvservice_adapter.rope import UnsupportedRotation

    try:
        loaded = load_model(model)
        if not loaded.tokenizer.chat_template:
            raise SystemExit(f"{loaded.model_id} has no chat template; the demo needs a model that was made for chat")
        with Client(address, name="demo engine") as client:
            engine = Engine(client, loaded, wait_s=wait_s)
            while True:
                method, arguments = pipe.recv()
                pipe.send(getattr(engine, method)(*arguments))
    except (UnsupportedModel, UnsupportedRotation, OSError) as error:
        raise SystemExit(f"the engine cannot work: {error}") from error
    except EOFError:
        return
