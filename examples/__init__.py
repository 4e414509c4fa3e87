"""Whole programs that use KVService. Run them from a checkout: ``python -m examples.save_and_load``.

* ``save_and_load``: saves, finds and loads blocks, with NumPy only.
* ``two_processes``: a scheduler looks blocks up, a worker loads them with the scheduler's lease ticket.
* ``chat_transformers``: a chat with a model of transformers, whose history is loaded instead of computed.
* ``batch``: many prompts with a common prefix, which is computed once.
* ``demo``: a long conversation with a real model, and what it proves (``make demo``).
"""
