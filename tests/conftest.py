"""Settings for all tests."""

from __future__ import annotations

import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()
