"""One thread: the models of the tests are small, and threads waiting for each other take longer than the work."""

import torch

torch.set_num_threads(1)
