"""What the daemon counts, as plain numbers that every module may increment.

``metrics.py`` turns them into Prometheus metrics and ``Status`` reports them by the same names.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """Totals since the daemon's start. Each field's help text is in ``HELP``."""

    lookup_blocks_asked: int = 0
    lookup_blocks_hit: int = 0
    load_blocks: int = 0
    load_bytes: int = 0
    located_blocks: int = 0
    loads_failed: int = 0
    save_blocks_stored: int = 0
    save_blocks_already_stored: int = 0
    save_blocks_refused: int = 0
    save_bytes: int = 0
    saves_abandoned: int = 0
    written_behind_blocks: int = 0
    written_behind_bytes: int = 0
    promoted_blocks: int = 0
    promoted_bytes: int = 0
    read_through_bytes: int = 0
    evicted_dram_blocks: int = 0
    evicted_ssd_blocks: int = 0
    lost_unwritten_blocks: int = 0
    discarded_blocks: int = 0
    quarantined_blocks: int = 0
    scrubbed_bytes: int = 0
    storage_errors: int = 0
    leases_granted: int = 0
    leases_expired: int = 0
    tls_reloads: int = 0
    tls_reloads_refused: int = 0
    sessions_begun: int = 0
    sessions_expired: int = 0
    session_changes_refused: int = 0
    hints_received: int = 0
    hints_unknown: int = 0
    hints_invalid: int = 0
    hints_over_limit: int = 0
    policy_failures: int = 0
    read_ahead_blocks: int = 0
    read_ahead_bytes: int = 0
    read_ahead_unused_blocks: int = 0
    hint_promoted_blocks: int = 0
    hint_promoted_bytes: int = 0
    hint_readiness_sent: int = 0

    def as_dict(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


HELP: dict[str, str] = {
    "lookup_blocks_asked": "Blocks that lookups asked for.",
    "lookup_blocks_hit": "Blocks that lookups found, up to the first missing one.",
    "load_blocks": "Blocks sent whole to clients.",
    "load_bytes": "Payload bytes sent to clients.",
    "located_blocks": "Blocks whose places in the arena were sent to clients, which read them there.",
    "loads_failed": "Loads that ended with an error of the store.",
    "save_blocks_stored": "Blocks stored by saves.",
    "save_blocks_already_stored": "Blocks of saves that the store already had.",
    "save_blocks_refused": "Blocks of saves that the store refused.",
    "save_bytes": "Payload bytes stored by saves.",
    "saves_abandoned": "Saves that ended without a commit.",
    "written_behind_blocks": "Blocks copied to the next slower tier.",
    "written_behind_bytes": "Bytes copied to the next slower tier.",
    "promoted_blocks": "Blocks copied from a slower tier to DRAM.",
    "promoted_bytes": "Bytes copied from a slower tier to DRAM.",
    "read_through_bytes": "Bytes sent from a slower tier to a client without a place in DRAM.",
    "evicted_dram_blocks": "Copies dropped from DRAM.",
    "evicted_ssd_blocks": "Copies dropped from SSD and from the tiers below it.",
    "lost_unwritten_blocks": "Blocks evicted from DRAM before they were on SSD.",
    "discarded_blocks": "Blocks dropped everywhere on request.",
    "quarantined_blocks": "Blocks quarantined because their bytes were damaged.",
    "scrubbed_bytes": "Bytes that scrubs have verified.",
    "storage_errors": "Reads, writes and commits that the operating system refused.",
    "leases_granted": "Leases granted.",
    "leases_expired": "Leases that expired.",
    "tls_reloads": "Times that the daemon loaded changed TLS files.",
    "tls_reloads_refused": "Times that changed TLS files could not be used; the earlier ones stay in use.",
    "sessions_begun": "Sessions created or forked.",
    "sessions_expired": "Sessions deleted because no client used them.",
    "session_changes_refused": "Changes of sessions refused because they started from another revision.",
    "hints_received": "Queued requests and other hints that clients sent.",
    "hints_unknown": "Hints about a session that does not exist for the client that sent them.",
    "hints_invalid": "Hints that were ignored because a field of them is not valid.",
    "hints_over_limit": "Hints that were ignored because a limit of the hints settings was reached.",
    "policy_failures": "Decisions that the placement policy was late with or failed at: recency decided.",
    "read_ahead_blocks": "Blocks copied from a slower tier to DRAM because the policy expects their next use.",
    "read_ahead_bytes": "Bytes of these blocks.",
    "read_ahead_unused_blocks": "Those of these blocks that left DRAM before a request used them.",
    "hint_promoted_blocks": "Blocks copied from a slower tier to DRAM because of hints.",
    "hint_promoted_bytes": "Bytes copied from a slower tier to DRAM because of hints.",
    "hint_readiness_sent": "Changes of a queued request's readiness that were sent to clients.",
}
assert set(HELP) == {field.name for field in fields(Counters)}
