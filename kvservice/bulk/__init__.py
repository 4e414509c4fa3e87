"""The bulk port: KV bytes between sockets and the arena, on threads of their own (`kvservice_api/bulk.py`)."""
