"""The weight map applied to gradients."""

from __future__ import annotations


def gradient_pieces(engine):
    """As `engine.pieces()`, over each parameter's main gradient (whole on every data-parallel rank only without the
    distributed optimizer)."""
    from megatron_t1.engine.parallel import shards
    from megatron_t1.weights.plan import local_pieces

    def gradients_of(chunk):
        return [(name, param.main_grad) for name, param in chunk.named_parameters()]

    return local_pieces(engine.chunks, engine.spec, shards(), gradients_of)
