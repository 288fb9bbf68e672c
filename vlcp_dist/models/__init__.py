"""Pretrained networks and classifiers as small functions over arrays and tensors."""

import logging

# diffusers imports accelerate, which imports DeepSpeed, which tells every process that sees no GPU of it.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
