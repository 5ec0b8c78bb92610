"""Functional tests start whole trainers: the fork server imports what they need once, not once a rank."""

from __future__ import annotations

import multiprocessing

multiprocessing.get_context("forkserver").set_forkserver_preload(["opsd_megatron.trainer.setup"])
