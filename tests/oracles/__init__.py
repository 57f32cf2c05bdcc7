"""Independent readers and writers of every format: whole tensors, plain code, no `reshard`."""
