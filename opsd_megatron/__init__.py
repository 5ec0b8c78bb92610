"""On-policy self-distillation of Qwen3 models on Megatron-Core, with rollouts from a co-located vLLM engine."""

__version__ = "0.1.0"
