"""Training on Megatron-Core: the only package, with `platform`, that imports it."""

import warnings

# Each of Megatron's modules warns of missing accelerations for itself; `Platform.describe` says it once.
warnings.filterwarnings("ignore", module=r"megatron\.core\.")
