"""The output layer and the loss in one, from hidden states to gradients without [tokens, vocabulary]: begin at `fused`.

`layout`: this rank's share of it; `tile_math`: a tile's logits to values and gradients (`triton_math` on a GPU,
`full_kl` with an anchor); `gemm`: which library multiplies.
"""
