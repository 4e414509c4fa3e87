"""A conversation with a real model, which loads its history from the daemon (`make demo`).

* ``script`` and ``book.txt``: the messages, and the events between the turns.
* ``conversation``: runs the script. It starts a daemon and an engine, kills both halfway, and starts them again.
* ``engine_process``: calls an engine in a process of its own.
* ``engine``: the engine. It keeps nothing from one turn to the next.
* ``in_memory``: an engine without a daemon, which keeps the KV of its conversation in memory (``--overflow``).
* ``generation``: tokens of messages, and greedy answers.
* ``report``: the table, and the JSON object.
"""
