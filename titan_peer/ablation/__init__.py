"""Comparing designs: plan.py makes the jobs, solve.py makes their costs equal, run.py trains them, results.py sums them
up."""
