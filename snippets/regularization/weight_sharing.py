"""Weight sharing: tied embeddings (Press and Wolf, 2017).

One matrix both turns tokens into vectors and scores vectors against all tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedEmbedding(nn.Module):
    """An embedding whose matrix is the output layer as well.

    Args:
        vocab_size: number of tokens, V.
        dim: size of their vectors, d_model.

    Raises:
        ValueError: vocab_size < 1 or dim < 1.

    Source:
        Press and Wolf, 2017, "Using the Output Embedding to Improve Language Models",
        1608.05859.
    """

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        if vocab_size < 1 or dim < 1:
            raise ValueError(
                f"vocab_size and dim must be at least 1, got {vocab_size} and {dim}"
            )
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))  # (V, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, with variance 1 / d_model.

        Hidden features of variance 1 then get logits of variance 1. With the variance
        of `nn.Embedding`, 1, that of the logits would be d_model: sure at once, and
        wrong.
        """
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """Looks up tokens: (...), int, from 0 to V - 1, to (..., d_model)."""
        return F.embedding(ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """The dot products with each token's vector: (..., d_model) to (..., V).

        Raises:
            ValueError: the last dimension of hidden is not d_model.
        """
        if hidden.shape[-1:] != self.weight.shape[1:]:
            raise ValueError(
                f"hidden must be (..., {self.weight.shape[1]}), "
                f"got {tuple(hidden.shape)}"
            )
        return F.linear(hidden, self.weight)  # (..., V)
