"""Evaluations of a model: perplexity, OpenAI evals and lm-eval tasks, during training and from the command line.

`perplexity.py`, `openai_evals.py` and `lm_evaluation_harness.py` are one adapter each; `suite.py` checks and runs what a
job names; `during_training.py` runs it on the weights of a training job; `commands/evaluate.py` is `titan-peer eval`.
"""
