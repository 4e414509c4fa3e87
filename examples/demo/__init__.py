"""A conversation with a real model, which loads its history from the daemon (`make demo`).

* ``script``: the messages, and the events between the turns.
* ``conversation``: runs the script. It starts a daemon and an engine, kills both halfway, and starts them again.
* ``processes``: the daemon and the engine as child processes.
* ``engine``: the engine's process. It keeps nothing from one turn to the next.
* ``model``: finds and loads the language model.
* ``report``: the table, and the JSON object.
"""
