"""Threads, and how kernels run where there is no GPU."""

import gc
import os
import tempfile

import torch

gc.set_threshold(100_000, 50, 1_000)  # Dynamo leaves much for it to look through, again and again
# the models of the tests are small, and threads waiting for each other take longer than the work
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is decorated
os.environ["DROPFX_CHECK"] = "1"  # passes check what holds between them
# what a GPU's tests measure is theirs alone
os.environ["DROPFX_CACHE_DIR"] = tempfile.mkdtemp(prefix="dropfx-tests-")
