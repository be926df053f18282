"""Activation offload: what autograd saves leaves the device and is back when backward asks for it.

    with hdp.offload():                      # around any model's forward: HF, Megatron, your own
        loss = model(batch)
    loss.backward()

    with hdp.offload(ratio=0.6, recompute_pointwise=1.0): ...

The parts, each file on top of the ones before it:

    pool      host memory in slabs, handed out in extents
    streams   what a device offers: streams, events, copies
    link      moves blocks of bytes and orders the copies by events
    tensors   what of a saved tensor travels, and what stays
    saved     what stands in the autograd graph
    recipe    how cheap results are made again instead of travelling
    forward   one forward pass: what happens to each tensor
    engine    where values are, and when they move

docs/offload.md says what it costs and when it pays.
"""
