"""Training on Megatron-Core: the only package, with `platform`, that imports it."""

import warnings

# Each of Megatron's modules warns of missing accelerations for itself; `Platform.describe` says it once.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
# Megatron-Core 0.16.1 calls these by their old names, and its schedule looks at the .grad of inner tensors.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
