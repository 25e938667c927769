"""Spellings of one operation, as `op_name` tells them apart."""

CATS = ("cat", "concat", "concatenate")
MULTIPLICATIONS = ("mul", "multiply")
DIVISIONS = ("div", "truediv", "divide", "true_divide")
CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
"""Name -> axes behind the channels. Transposed ones, whose weight is [in, out, ...], are not among them."""
ALL_CONVOLUTIONS = (*CONVOLUTIONS, *(f"conv_transpose{n}d" for n in (1, 2, 3)))
POOLS = tuple(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3))
GEMMS = ("linear", "embedding", *CONVOLUTIONS)
"""Layers that can make compact values of their own: they look up or multiply by a part of their weight."""
SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
"""Along one axis, which all keep."""
SUMS = ("add", "sub", "subtract")
