"""What must be said before libraries are first imported: how threads wait, so that a busy machine does not slow tests many
times, and that Triton's kernels are run by its interpreter where there is no GPU."""

import os

from titan_peer.common.cpu_threads import let_waiting_threads_sleep

let_waiting_threads_sleep()

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
