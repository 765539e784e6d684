"""The one forward path: decoder, operations, sampler. Tensors in, tensors and tokens out."""
