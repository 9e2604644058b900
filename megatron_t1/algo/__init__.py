"""The algorithm: advantages, the loss and its KL as functions of tokens, and the fused head that feeds them."""
