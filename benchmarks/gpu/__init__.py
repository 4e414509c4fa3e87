"""Measures the GPU path: ``python -m benchmarks.gpu [PART...] [--write docs/benchmarks.md]``, or ``make gpu-bench``.

* ``copies``: bytes per second between the DRAM tier and a GPU's pages, beside plain copies of the same size.
* ``ttft``: the time to the first token with random weights in the shapes of Llama-2-13B and Mistral-7B.
* ``saving``: how much a save slows the forward pass down.

``compute`` has the forward pass, ``rig`` the daemon and the loads and saves, ``machine`` what the computer is. With
``--rehearsal`` everything runs with tiny sizes, also where CUDA is simulated or absent: its figures mean nothing.
"""

PARTS = ("copies", "ttft", "saving")
