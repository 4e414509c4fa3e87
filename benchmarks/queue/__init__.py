"""Measures the time to the first token in a queue of conversations: ``python -m benchmarks.queue``.

``conversations`` runs a queue through an engine and a real daemon, once per way and round; ``engines`` has the
transformers connector and vLLM; ``report`` has the table and the picture.
"""
