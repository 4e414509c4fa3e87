"""What every connector needs, and no engine. No module here imports an engine, a connector or torch.

* ``prefix_lookup``: what of a prompt is stored. ``planning``: load, compute, or both, and what is learned from it.
* ``forward_saves``: the saves of what one forward computes; ``turn_saver``: of the rest, when a turn has ended.
* ``session_sync``: a session names the blocks of its conversation.
* ``request_report``: what became of a request, for the plans to come and for `kvctl explain`.
"""
