"""Wire to domain and back, and nothing else: no rule of the store is in here."""

import kvservice_api.grpc_forks  # noqa: F401  # Before a module of this package imports gRPC.
