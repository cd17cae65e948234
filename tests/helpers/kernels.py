"""Where the Triton kernels run in the tests, and which ones a backward pass launches."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKWARD = {"query_gradient", "column_gradients", "finish_gradients"}
