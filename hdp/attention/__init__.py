"""Ring attention: the layout of a microbatch, the communicator, and the block kernels."""
