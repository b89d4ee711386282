"""What Python may ask of a tensor while a program is captured, and what it may not."""

# Tensor attributes and methods that are facts of the program rather than values that flow through it.
FACTS = frozenset(
    [
        "ndim",
        "requires_grad",
        "layout",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "is_leaf",
        "grad_fn",
        "names",
        "itemsize",
        "is_mkldnn",
        "is_xla",
        "is_mps",
        "is_ipu",
        "is_xpu",
        "is_vulkan",
    ]
)
FACT_METHODS = frozenset(
    [
        "dim",
        "ndimension",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "element_size",
        "get_device",
        "stride",
        "storage_offset",
        "is_signed",
        "is_inference",
        "is_conj",
        "is_neg",
    ]
)
WHERE = frozenset(["is_meta", "is_cuda", "is_cpu", "is_mps", "is_xpu", "get_device", "type", "index"])
VALUE_METHODS = frozenset(["item", "tolist", "numpy", "__array__", "data_ptr"])
