"""Prompts beside zero-shot, few-shot, LoRA and full fine-tuning: the same rows, template, budget and evaluator."""
