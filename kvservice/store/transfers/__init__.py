"""The only ways to access a block's bytes: uploads, reads, and both in place in shared memory."""
