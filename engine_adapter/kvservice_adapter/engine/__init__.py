"""The parts that all connectors share. No module here imports an engine, a connector or torch.

* ``prefix_lookup``: what of a prompt is stored. ``planning``: load, compute, or both, and what is learned from it.
* ``forward_saves``: the saves of what one forward computes; ``turn_saver``: of the rest, when a turn has ended.
* ``session_sync``: a session names the blocks of its conversation.
* ``request_report``: how a request went, for later plans and for `kvctl explain`.
"""
