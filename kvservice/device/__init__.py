"""Copies between the arena and GPU memory that engines export. Optional: CuPy is imported when a GPU is used."""
