"""Why a store's index cannot be opened. Failures of a running index are ``KVError``.

* StoreError
  x StoreLocked   stop the other process, or name another store
  x StoreTooNew   run the KVService that wrote the store, or a newer one
  x StoreDamaged  restore the index from a copy, run `kvservice check --repair` to save sound records or
                  `kvservice check --rebuild` to find the blocks in the SSD files, or start a new store
"""

from __future__ import annotations


class StoreError(Exception):
    """Base of the reasons why a store cannot be opened. The message says what the operator can do."""


class StoreLocked(StoreError):
    """Another process uses the store."""


class StoreTooNew(StoreError):
    """The store was written by a newer schema than this program knows."""


class StoreDamaged(StoreError):
    """The index is gone or empty though the store is there, is no LMDB file, or has damaged pages."""

    what_helps = (
        "Restore the index from a copy, or have `kvservice check STORE --repair` save what can be saved of it, or "
        "`kvservice check STORE --rebuild` make a new one of the blocks in the SSD files, or start a new store in "
        "another folder"
    )
