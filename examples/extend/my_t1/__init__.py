"""Additions to megatron_t1: one module for what graders import, others for what needs torch."""
