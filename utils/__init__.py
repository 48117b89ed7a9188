"""The package that the three steps share."""

import logging

# Without a GPU, DeepSpeed greets every program that imports it with a line about that on standard output.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
# bitsandbytes, which transformers imports where it is installed, tells of kernels for generation that it has not.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
