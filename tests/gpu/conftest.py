from __future__ import annotations

from tests.integration.conftest import daemon, new_daemon

__all__ = ["daemon", "new_daemon"]
