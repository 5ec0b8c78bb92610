"""Evaluation: judged answers, and what they say about a model."""
