"""The package that the three steps share."""

import logging

# Without a GPU, DeepSpeed greets every program that imports it with a line about that on standard output.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
