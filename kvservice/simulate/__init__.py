"""Runs placement policies, the very classes of `kvservice.policy`, on traces and generated load.

``engine`` is the main loop and ``simulate``; ``inference_server`` says when a turn runs, ``load_or_recompute`` what it
reads, ``session_replay`` and ``prefix_replay`` what it uses, ``store_model`` and ``ssd_channel`` what moves;
``account`` makes the ``result``. ``bounds`` and ``clairvoyant`` are what no policy can do.
"""
