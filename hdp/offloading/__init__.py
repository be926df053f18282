"""Activation offload: what autograd saves leaves the device and is back when backward asks for it.

    with hdp.offload():                      # around any model's forward: HF, Megatron, your own
        loss = model(batch)
    loss.backward()

    with hdp.offload(ratio=0.6, recompute_pointwise=1.0): ...

The layers, each a file that imports only those above it (tests/offloading/test_layers.py):

    types             ActivationPolicy, CopyBuffers, counts, errors
    tensors           which bytes of a saved tensor are moved, and which tensors stay
    pool              host memory in slabs, handed out in extents
    memory            how much host memory there is, and pages of it near a device
    streams           what a device offers: streams, events, copies
    link              moves blocks of bytes and orders the copies by events
    store             Saved: one value that backward needs; Store: where values are
    registry          which Saved holds the present value of a tensor
    recipe            how to recompute a value from others
    tape              watches a forward's operations to make recipes
    send_queue        which tensors go to the host, and when they leave
    backward_order    what backward asks for next, to fetch it before
    packed            what stands in the autograd graph
    forward           one forward pass: what happens to each tensor
    engine            opens forwards on a link
    context           hdp.offload()
    per_microbatch    the policy of each microbatch, from its plan

docs/offload.md says what it costs and when it pays.
"""
