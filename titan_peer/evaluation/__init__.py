"""Evaluations of a model: perplexity, OpenAI evals and lm-eval tasks, during training and from the command line.

`perplexity.py`, `openai_evals.py` and `lm_evaluation_harness.py` are one adapter each; `suite.py` checks and runs the
evaluations that a job names; `during_training.py` runs them on a training job's weights; `titan-peer eval` is
`commands/evaluate.py`.
"""
