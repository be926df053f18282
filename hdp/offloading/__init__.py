"""Activation offload: saved tensors move to the host and return before backward needs them.

    with hdp.offload():                      # around any model's forward: HF, Megatron, your own
        loss = model(batch)
    loss.backward()

    with hdp.offload(ratio=0.6, recompute_pointwise=1.0): ...

The layers: each file imports only those above it (tests/offloading/test_layers.py):

    types             ActivationPolicy, CopyBuffers, counts, errors
    tensors           which bytes of a saved tensor move, and which tensors stay
    pool              host memory in slabs, handed out in extents
    memory            how much host memory is available, and pages near a device
    streams           the device interface: streams, events, copies
    link              moves blocks of bytes, ordered by events
    store             Saved: a value that backward needs; Store: where each one is
    registry          which Saved holds the current value of a tensor
    recipe            how to recompute a value from others
    tape              records a forward's operations to build recipes
    send_queue        which tensors go to the host, and when they leave
    backward_order    what backward needs next, to prefetch it
    packed            what the autograd graph holds in place of tensors
    forward           one forward pass: decides what happens to each tensor
    engine            creates forwards that share a link
    context           hdp.offload()
    per_microbatch    sets each microbatch's policy from its plan

See docs/offload.md for what it costs and when it pays off.
"""
