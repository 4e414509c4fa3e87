"""What a load asks of its server: how long it would take if no turn waited for another one."""

from __future__ import annotations

import numpy as np

from kvservice.simulate.settings import Machine
from kvservice.simulate.workload import Workload


def unhindered_s(workload: Workload, machine: Machine) -> tuple[float, float]:
    """When the first request arrives and when the last answer ends, in seconds, if all hits and no turn waits."""
    if machine.service_turns_per_s is not None:
        turn_s = np.full(workload.turns, 1.0 / machine.service_turns_per_s)
    else:
        turn_s = workload.output_tokens / machine.decode_tokens_per_s
        if not workload.shares_prefixes:
            turn_s += workload.new_tokens / machine.prefill_tokens_per_s
    if not workload.turns:
        return 0.0, 0.0
    session, arrives_s = workload.session.astype(np.int64), workload.arrives_s
    firsts = np.flatnonzero(np.diff(session, prepend=-1))
    passed_s = np.cumsum(np.concatenate([[0.0], turn_s[:-1] + np.nan_to_num(workload.think_s[1:])]))
    # Since the session's first request, if every later one came after the answer before it.
    passed_s -= np.repeat(passed_s[firsts], np.diff(np.append(firsts, workload.turns)))
    # A request comes at its own time, or after the answer before it: the latest of the times that its session allows.
    own_s = np.where(np.isnan(arrives_s), -np.inf, arrives_s - passed_s)
    apart_s = session * (np.ptp(own_s[np.isfinite(own_s)]) + 1.0)  # A later session's times are above an earlier one's.
    arrives_s = np.maximum.accumulate(own_s + apart_s) - apart_s + passed_s
    return float(arrives_s.min()), float((arrives_s + turn_s).max())
