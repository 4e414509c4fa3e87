"""What daemon and adapter both do with a GPU: streams, device memory, and copies between stored slices and pages.

`geometry` needs NumPy alone. The other modules import CuPy when they first use a GPU, so each of them can be imported
on a machine without one.
"""
