"""Tests of opsd_megatron.checkpoint."""
