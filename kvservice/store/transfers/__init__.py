"""The only ways to touch a block's bytes: uploads, reads, and both in place in shared memory."""
